"""KNorm: the tokens whose keys are short stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tamis.methods.base import Evict, budget_param, param
from tamis.methods.views import LayerView


@dataclass(frozen=True)
class KNorm(Evict):
    """Once, when the prompt is computed, keeps the tokens whose keys have the smallest L2 norm.

    The score of token `j` is `-|k_j|`: keys of small norm are those that receive much attention,
    and no query is needed to know them. In the first two layers that does not hold, so they keep
    everything. In the others a head with budget `b` keeps its `b` best.

    Default: half of the prompt, which the paper finds to cost nothing in language modelling and
    needle-in-a-haystack.
    """

    paper: ClassVar[str] = (
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv:2406.11430)"
    )

    budget: int | float = budget_param(0.5)
    skip_layers: int = param(2, "first layers, which keep everything", minimum=0)

    def scores(self, view: LayerView) -> Tensor:
        """Norms of the keys, the smallest first."""
        keys, _ = view.keys_values()
        return -keys.float().norm(dim=-1)

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """The highest scores; in the first layers everything."""
        if view.layer < self.skip_layers:
            return view.cached
        return super().keep(view, scores, budget)
