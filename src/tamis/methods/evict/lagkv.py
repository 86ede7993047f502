"""LagKV: tokens that stand out against those that follow them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.base import Evict, budget_param, param
from tamis.methods.views import LayerView, top_mask


@dataclass(frozen=True)
class LagKV(Evict):
    """Scores tokens without any attention, by how unevenly their channels lie within the range that
    the following tokens span.

    Behind `sinks` first tokens the text is cut into partitions of `lag` tokens. Of partition `p`,
    keys and values are normalized per channel by the minimum and maximum of partition `p + 1`,
    `(x - min) / (max - min)`; a token's score is the standard deviation of that over its channels,
    after a softmax over its partition, summed over keys and values (its section on the method).
    Of every partition that has a full successor a head keeps its `n` best tokens; the last full
    partition and what follows always stay.

    Defaults are the reference code's: sinks 16, lag 128, half of each partition. Departures:

    - The paper sets `n = r * lag` by a ratio `r`; here `n` is the largest with which the prompt
      ends within its budget, which is the same ratio for all partitions. Later partitions are
      compressed alike while tokens are generated, so the cache grows by `n` per `lag` tokens.
    - A budget (by a share) below sinks, last partition and remainder keeps these nevertheless.
    - The standard deviation is the unbiased one, as in the reference code; a channel that does not
      vary in partition `p + 1` has its range taken as 1e-6.

    A partition that was compressed holds no more than `n` tokens, so it is never compressed again:
    for given keys and values, which tokens stay does not depend on the chunks in which they came.
    Those keys and values themselves do, in all layers but the first, since the queries of a chunk
    see what was left of the chunks before it.
    """

    paper: ClassVar[str] = (
        "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important "
        "(arXiv:2504.04704)"
    )
    per_chunk: ClassVar[bool] = True

    budget: int | float = budget_param(0.5)
    sinks: int = param(16, "first tokens that always stay", minimum=0)
    lag: int = param(128, "tokens of a partition", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, int) and self.budget <= self.sinks + self.lag:
            raise PlanError(
                f"{self}: a budget of {self.budget} tokens leaves none beside {self.sinks} sinks "
                f"and the last {self.lag}; it must be at least {self.sinks + self.lag + 1}"
            )

    @property
    def interval(self) -> int:
        return self.lag

    def scores(self, view: LayerView) -> Tensor:
        """Scores within whole partitions that have whole successors; +inf for all other tokens."""
        head, own, following = self._partitions(view)
        scores = view.positions.new_full(view.positions.shape, torch.inf, dtype=torch.float32)
        scores[head, own] = sum(
            _unevenness(x[head, own].float(), x[head, following].float())
            for x in view.keys_values()
        )
        return scores

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """The best of each whole partition that has a whole successor, and all other tokens."""
        head, own, _ = self._partitions(view)
        kept = view.cached.clone()
        kept[head, own] = top_mask(scores[head, own], self._kept(budget, view)[head[:, 0]])
        return kept

    def _partitions(self, view: LayerView) -> tuple[Tensor, Tensor, Tensor]:
        """Whole partitions with whole successors: the head of each, [m, 1], its tokens and its
        successor's as indices into the cache, [m, lag]."""
        positions = view.positions.masked_fill(~view.cached, torch.iinfo(torch.int64).max)
        end = max(self.sinks, int(view.positions.max()) + 1)
        edges = torch.arange(self.sinks, end + 1, self.lag, device=positions.device)
        starts = torch.searchsorted(
            positions.contiguous(), edges.expand(len(positions), -1).contiguous()
        )
        whole = starts.diff(dim=1) == self.lag
        head, part = (whole[:, :-1] & whole[:, 1:]).nonzero(as_tuple=True)
        inside = torch.arange(self.lag, device=positions.device)
        own, following = (starts[head, part + i][:, None] + inside for i in (0, 1))
        return head[:, None], own, following

    def _kept(self, budget: Tensor, view: LayerView) -> Tensor:
        """Tokens that each head keeps of a partition, int64 [kv_heads]."""
        behind = max(0, view.prompt_tokens - self.sinks)
        partitions = max(0, behind // self.lag - 1)
        if partitions == 0:  # nothing of the prompt is evicted: the share of the whole prompt
            kept = self.lag * budget // max(1, view.prompt_tokens)
        else:
            kept = (budget - view.prompt_tokens + partitions * self.lag) // partitions
        return kept.clamp(0, self.lag)


def _unevenness(x: Tensor, following: Tensor) -> Tensor:
    """Softmax over tokens of the deviation over channels, [m, lag], of x [m, lag, dim] within the
    range of `following`, shaped alike."""
    low, high = following.amin(1, keepdim=True), following.amax(1, keepdim=True)
    normalized = (x - low) / (high - low).clamp_min(1e-6)
    centred = normalized - normalized.mean(-1, keepdim=True)
    # what .std(-1) gives, which takes three times as long on a CPU
    deviation = (centred.square().sum(-1) / (x.shape[-1] - 1)).sqrt()
    return deviation.softmax(-1)
