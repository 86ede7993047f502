"""Scissorhands: what was pivotal stays pivotal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Evict, budget_param, param
from tamis.methods.evict.recent import keep_recent_and_top, recent
from tamis.methods.views import LayerView, Needs, group_sum


@dataclass(frozen=True)
class Scissorhands(Evict):
    """When the cache is full, drops at once many of the tokens that were seldom important.

    Over the last `history` queries `t`, `I_j = #{t : a_tj < 1 / n_t}` counts how often token `j`
    got less than the average of the `n_t` tokens that `t` sees. A head of more than `b` tokens
    keeps `b - round(drop * b)`: the `recent` newest and the lowest `I_j` (algorithm 2). A head
    within its budget keeps all.

    Defaults: history 400, recent 10, drop 0.5, budget a fifth of the prompt. Departures:

    - The paper's record is written while tokens pass; here it is taken from the last queries when
      it is needed, over the tokens that are then cached.
    - Query heads that share a KV head add up their counts; the paper's models share none.
    - Fullness is checked after each chunk of the prompt and every `interval` generated tokens, by
      which the cache may exceed the budget; the paper checks at every token.
    """

    paper: ClassVar[str] = (
        "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache "
        "Compression at Test Time (arXiv:2305.17118)"
    )
    query_dependent: ClassVar[bool] = True
    per_chunk: ClassVar[bool] = True

    budget: int | float = budget_param(0.2)
    history: int = param(400, "last queries over which importance is counted", minimum=1)
    recent: int = param(10, "newest tokens that always stay", minimum=1)
    drop: float = param(0.5, "share of the budget that is dropped at once", minimum=0, maximum=1)
    interval: int = param(64, "generated tokens between two checks for fullness", minimum=1)

    def needs(self) -> Needs:
        return Needs(queries=self.history)

    def scores(self, view: LayerView) -> Tensor:
        """Minus the count of each token, the newest tokens +inf."""
        weights = view.window(self.history)
        newest = view.positions.max()
        times = newest - torch.arange(weights.shape[1] - 1, -1, -1, device=newest.device)
        seen = view.cached[:, None] & (view.positions[:, None] <= times[:, None])
        average = 1 / seen.sum(-1, keepdim=True).clamp_min(1)
        group = len(weights) // len(seen)
        low = weights < average.repeat_interleave(group, 0)
        low &= seen.repeat_interleave(group, 0)
        counts = group_sum(low.sum(1), len(seen))
        return (-counts.float()).masked_fill(recent(view, self.recent), torch.inf)

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """All of a head within its budget; of a full one, what is left after the bulk is gone."""
        left = (budget - (self.drop * budget).round().long()).clamp_min(1)
        target = torch.where(view.lengths > budget, left, view.lengths)
        return keep_recent_and_top(view, scores, self.recent, target)
