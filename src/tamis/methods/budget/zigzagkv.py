"""ZigZagKV: layers that need many tokens to keep their attention get many."""

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
class ZigZagKV(Budget):
    """Budgets follow the layers' uncertainty: how many tokens it takes to keep their attention.

    The minimum budget of a head is the number of its strongest tokens whose attention weights add
    up to `threshold`; the mean over a layer's heads is `LMBA_l`. Every layer gets a minimum, and
    what remains is shared in proportion to `LMBA_l / sum LMBA`.

    Departures:

    - The weights are the mean over the last `window` queries. The paper's second measure, the
      budget that keeps a layer's output (LMBO), is not taken: its allocation uses LMBA alone.
    - `minimum` is a share of the budget a layer would have had; its default is ours.
    - No layer gets more than the prompt or its sliding window; what is beyond goes to the others.
    """

    paper: ClassVar[str] = (
        "ZigZagKV: Dynamic KV Cache Compression for Long-context Modeling based on Layer "
        "Uncertainty (arXiv:2412.09036)"
    )
    query_dependent: ClassVar[bool] = True

    threshold: float = param(0.9, "share of the attention to keep", above=0, maximum=1)
    minimum: float = param(0.5, "share of its budget that no layer loses", minimum=0, maximum=1)
    window: int = param(32, "last queries whose attention counts", minimum=1)

    def needs(self) -> Needs:
        return Needs(queries=self.window)

    def allocate(
        self, budget: Tensor, views: Sequence[LayerView], scores: Sequence[Tensor]
    ) -> Tensor:
        """The minimum everywhere, and the rest by uncertainty."""
        usable, largest = bounds(budget, views)
        lmba = torch.tensor([self.layer_minimum_budget(view) for view in views])
        shares = (usable > 0) * lmba.to(budget.device)[:, None]
        rest = (1 - self.minimum) * usable.sum()
        wanted = self.minimum * usable + rest * shares / shares.sum().clamp_min(1e-9)
        smallest = (self.minimum * usable).long().maximum(usable.clamp(max=1))
        return apportion(wanted, int(usable.sum()), smallest, largest)

    def layer_minimum_budget(self, view: LayerView) -> float:
        """LMBA: the mean over query heads of the tokens that hold `threshold` of the attention."""
        weights = view.window(self.window).mean(1)
        held = weights.sort(dim=1, descending=True).values.cumsum(1)
        needed = (held < self.threshold).sum(1) + 1
        return float(needed.clamp(max=weights.shape[1]).float().mean())
