"""H2O: recent tokens and heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tamis.methods.base import Evict, budget_param, param
from tamis.methods.evict.recent import keep_recent_and_top
from tamis.methods.views import LayerView, Needs


@dataclass(frozen=True)
class H2O(Evict):
    """Keeps the tokens that have gathered the most attention, and the recent ones.

    The score of token `j` is `sum_i a_ij`, its softmax weights summed over all queries `i` so far
    (section 4, algorithm 1). Of budget `b`, `round(heavy * b)` tokens are heavy hitters and the
    rest are the newest tokens.

    Defaults: a fifth of the prompt, half of it heavy hitters (section 5). Departures:

    - Query heads that share a KV head add up their weights, since they share its tokens; the paper
      has one query head per KV head.
    - The paper evicts at every token. The reference code takes the whole prompt at once; here a
      prompt is evicted after each of its chunks, and what was dropped receives no more weight.
      `interval` evicts every few generated tokens.
    """

    paper: ClassVar[str] = (
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models "
        "(arXiv:2306.14048)"
    )
    query_dependent: ClassVar[bool] = True
    per_chunk: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    budget: int | float = budget_param(0.2)
    heavy: float = param(0.5, "share of the budget for heavy hitters", minimum=0, maximum=1)
    interval: int = param(1, "generated tokens between two evictions", minimum=1)

    def needs(self) -> Needs:
        return Needs(attention=True)

    def scores(self, view: LayerView) -> Tensor:
        """Accumulated attention."""
        return view.attention()

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """The newest tokens of each head's budget, then its heavy hitters."""
        heavy_hitters = (self.heavy * budget).round().long()
        return keep_recent_and_top(view, scores, budget - heavy_hitters, budget)
