"""SqueezeAttention: layers that change the hidden states little give up budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Budget, param
from tamis.methods.budget.apportion import apportion, bounds
from tamis.methods.views import LayerView, Needs


@dataclass(frozen=True)
class SqueezeAttention(Budget):
    """Layers whose attention hardly turns the hidden states keep less, the others more.

    A layer's importance is the mean cosine similarity of the prompt's hidden states before and
    after its attention: the more similar, the less important. K-means puts the layers into three
    groups. Those of the most similar group keep `p * b` of their budget `b`; what that saves is
    shared evenly by all other layers (algorithm 1).

    Default p 0.4 (the paper finds 0.3 to 0.4 best). Departures:

    - K-means over numbers is solved exactly, by trying all cuts of the sorted similarities into
      three, so that it needs no seed. Fewer than three layers, or equal ones, are left alone.
    - No layer gets more than the prompt or its sliding window; what is beyond goes to the others.
    """

    paper: ClassVar[str] = (
        "SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise Optimal "
        "Budget (arXiv:2404.04793)"
    )

    p: float = param(0.4, "share of their budget that unimportant layers keep", above=0, maximum=1)

    def needs(self) -> Needs:
        return Needs(similarity=True)

    def allocate(
        self, budget: Tensor, views: Sequence[LayerView], scores: Sequence[Tensor]
    ) -> Tensor:
        """The budgets with those of unimportant layers squeezed."""
        usable, largest = bounds(budget, views)
        squeezed = most_similar(torch.tensor([view.similarity() for view in views]))
        squeezed = squeezed.to(budget.device)
        others = int(usable[~squeezed].sum())
        if others == 0:
            return usable
        saved = (1 - self.p) * int(usable[squeezed].sum())
        factor = torch.where(squeezed, self.p, 1 + saved / others)
        return apportion(usable * factor[:, None], int(usable.sum()), usable.clamp(max=1), largest)


def most_similar(similarity: Tensor) -> Tensor:
    """The group of highest values after k-means with three groups, bool [layers]; none of fewer
    than three layers."""
    n = len(similarity)
    if n < 3:
        return torch.zeros(n, dtype=torch.bool)
    ordered = similarity.double().sort().values
    sums, squares = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (ordered, ordered.square()))
    cuts = torch.combinations(torch.arange(1, n), 2)
    edges = torch.nn.functional.pad(cuts, (1, 0), value=0)
    edges = torch.nn.functional.pad(edges, (0, 1), value=n)
    spread = squares[edges].diff() - sums[edges].diff().square() / edges.diff()
    first = cuts[spread.sum(1).argmin(), 1]
    return similarity >= ordered[first]
