"""SnapKV: the prompt's last queries choose what of it stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.base import Evict, budget_param, param
from tamis.methods.evict.recent import keep_recent_and_top, recent
from tamis.methods.views import LayerView, Needs, group_sum


@dataclass(frozen=True)
class SnapKV(Evict):
    """Once, when the prompt is computed, keeps the tokens to which its last queries attend, in
    clusters, and those queries' own tokens.

    `C_j = sum_i a_ij` over the `window` last queries `i` of the prompt; the score of token `j` is
    the maximum (or mean) of `C` over the `kernel` tokens around it (section 4.2, listing 1). With
    budget `b`, a head keeps its `b - window` best and the window.

    Defaults are those of the experiments on LongBench: window 32, kernel 7, max pooling, of
    1,024 tokens. The reference code, like here, pools over the tokens before the window only and
    counts what lies beyond the ends as zero. Departure: the reference code repeats shared KV heads
    and evicts for every query head; here the query heads that share a KV head average their pooled
    scores, so that sharing survives.
    """

    paper: ClassVar[str] = (
        "SnapKV: LLM Knows What You are Looking for Before Generation (arXiv:2404.14469)"
    )
    query_dependent: ClassVar[bool] = True

    budget: int | float = budget_param(1024)
    window: int = param(32, "last queries of the prompt that choose", minimum=1)
    kernel: int = param(7, "tokens over which scores are pooled, an odd number", minimum=1)
    pooling: str = param("max", "how scores are pooled", choices=("max", "mean"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise PlanError(f"{self}: kernel must be odd, so that it has a middle")
        if isinstance(self.budget, int) and self.budget <= self.window:
            raise PlanError(
                f"{self}: a budget of {self.budget} tokens leaves none beside the window of "
                f"{self.window}; it must be at least {self.window + 1}"
            )

    def needs(self) -> Needs:
        return Needs(queries=self.window)

    def scores(self, view: LayerView) -> Tensor:
        """Pooled attention of the window; its own tokens +inf."""
        own = recent(view, self.window)
        group = view.shape.layers[view.layer].q_heads // len(own)
        sums = view.window(self.window).sum(1)
        sums = sums.masked_fill(own.repeat_interleave(group, 0), 0.0)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(sums, self.kernel, stride=1, padding=self.kernel // 2)
        return (group_sum(pooled, len(own)) / group).masked_fill(own, torch.inf)

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """The window, then the highest scores."""
        return keep_recent_and_top(view, scores, self.window, budget)
