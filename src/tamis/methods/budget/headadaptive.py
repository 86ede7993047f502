"""Head-adaptive budgets: the heads of a layer share one budget by what they score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Budget, param
from tamis.methods.budget.apportion import apportion, bounds
from tamis.methods.views import LayerView


@dataclass(frozen=True)
class HeadAdaptive(Budget):
    """The tokens of all heads of a layer compete for the sum of the heads' budgets.

    With budgets `b_h`, the `sum b_h` highest scores of the layer are chosen over all its heads;
    `B_h` of them are of head `h`, which gets `safeguard * b_h + (1 - safeguard) * B_h` tokens, so
    that heads with spread attention get more and none gets nothing (Ada-KV, algorithm 1).

    The default safeguard 0.2, and that it is applied beside the tokens that stay in any case (those
    scored +inf), follow the reference code. Departures:

    - Of equal scores each head gets its proportion.
    - No head gets more than the prompt or its sliding window; what is beyond goes to the others.
    """

    paper: ClassVar[str] = (
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM "
        "Inference (arXiv:2407.11550)"
    )

    safeguard: float = param(0.2, "share of its budget that every head keeps", minimum=0, maximum=1)

    def allocate(
        self, budget: Tensor, views: Sequence[LayerView], scores: Sequence[Tensor]
    ) -> Tensor:
        """Every layer's budget, shared among its heads."""
        usable, largest = bounds(budget, views)
        allocated = torch.zeros_like(budget)
        for row, (view, score) in enumerate(zip(views, scores, strict=True)):
            heads = slice(0, len(view.lengths))
            own, most = usable[row, heads], largest[row, heads]
            stay = (view.cached & score.isposinf()).sum(1).minimum(own)
            free = own - stay
            chosen = _chosen(score.masked_fill(~view.cached, -torch.inf), int(free.sum()))
            wanted = stay + self.safeguard * free + (1 - self.safeguard) * chosen
            smallest = (stay + (self.safeguard * free).long()).maximum(own.clamp(max=1))
            allocated[row, heads] = apportion(wanted, int(own.sum()), smallest, most)
        return allocated


def _chosen(scores: Tensor, count: int) -> Tensor:
    """How many of the `count` highest finite scores of all heads each head has, fp64 [heads]."""
    finite = scores.isfinite()
    count = min(count, int(finite.sum()))
    if count == 0:
        return torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    last = scores[finite].topk(count).values[-1]
    above = (finite & (scores > last)).sum(1)
    equal = (finite & (scores == last)).sum(1)
    return above + equal * ((count - above.sum()) / equal.sum()).double()
