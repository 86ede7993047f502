"""KVMerger: consecutive tokens with similar keys become one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.methods.base import Evict, Merge, budget_param, param, resolve
from tamis.methods.evict.recent import recent
from tamis.methods.views import LayerView, Merged, Needs, top_mask

_PAPER = (
    "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks "
    "(arXiv:2407.08454)"
)


@dataclass(frozen=True)
class KVMergerEviction(Evict):
    """The merging sets of KVMerger: of every set the token with the most attention stays.

    Recent tokens, and of the others those that received the most attention, have score +inf and
    belong to no set. The rest is cut into sets of consecutive tokens: two neighbours are in one set
    if the cosine similarity of their keys is above `threshold` (the paper's clustering, where only
    neighbours may join). See `KVMerger`.
    """

    paper = _PAPER
    query_dependent = True

    budget: int | float = budget_param(0.5)
    threshold: float = param(0.75, "cosine similarity that joins neighbours", minimum=-1, maximum=1)
    recent: float = param(0.34, "share of the budget for recent tokens", minimum=0, maximum=1)
    heavy: float = param(0.24, "share of the budget for heavy hitters", minimum=0, maximum=1)

    def needs(self) -> Needs:
        return Needs(attention=True)

    def scores(self, view: LayerView) -> Tensor:
        budget = resolve(self.budget, view.prompt_tokens)
        sums = view.attention()
        newest = recent(view, round(self.recent * budget))
        others = sums.masked_fill(newest | ~view.cached, -torch.inf)
        heavy = top_mask(others, torch.full_like(view.lengths, round(self.heavy * budget)))
        return sums.masked_fill(newest | heavy, torch.inf)

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        pivots = _pivots(view, scores, view.cached, self.threshold)
        places = torch.arange(scores.shape[1], device=scores.device)
        small = (view.lengths <= budget.to(view.lengths.device))[:, None]
        stay = view.cached & ((pivots == places) | small)
        return top_mask(scores.masked_fill(~stay, -torch.inf), budget)


@dataclass(frozen=True)
class KVMerger(Merge):
    """The tokens of a merging set are averaged into its pivot with Gaussian weights.

    For the pivot p of a set (the token with the most attention) and its other tokens i
    (Gaussian kernel weighted merging):

        g_i = exp(-|k_p - k_i|^2 / (2 sigma^2)),  sigma = mean_i |k_p - k_i| / sqrt(2)
        new key of p = (k_p + sum_i g_i k_i) / (1 + sum_i g_i)

    and values with the same weights. Sets come from `KVMergerEviction`; paper default: threshold
    0.75. The paper sets the shares of recent and heavy tokens per budget; here they are shares of
    the budget.

    Departures. In the paper the threshold alone decides how much is merged. Here the budget does
    too: a head within its budget keeps all its tokens, and of a head that still has more than its
    budget after merging, the pivots with the least attention are dropped. The mean in sigma is
    over the tokens that are merged, the pivot not counted. Sets are found once, at the prompt's
    end. With another eviction, beside which `budget`, `recent` and `heavy` are refused, an evicted
    token joins the kept token of its set with the highest score, and is dropped if there is none.
    Keys are compared as they are cached, rotated.
    """

    paper = _PAPER
    query_dependent = True
    of_eviction = ("budget", "recent", "heavy")

    budget: int | float = budget_param(0.5)
    threshold: float = param(0.75, "cosine similarity that joins neighbours", minimum=-1, maximum=1)
    recent: float = param(0.34, "share of the budget for recent tokens", minimum=0, maximum=1)
    heavy: float = param(0.24, "share of the budget for heavy hitters", minimum=0, maximum=1)

    def eviction(self) -> KVMergerEviction:
        return KVMergerEviction(self.budget, self.threshold, self.recent, self.heavy)

    def merge(self, view: LayerView, scores: Tensor, kept: Tensor) -> Merged:
        k, v = view.keys_values()
        pivots = _pivots(view, scores, kept, self.threshold)
        merged = view.cached & ~kept & (pivots < scores.shape[1])
        into = torch.where(merged, pivots, 0)
        keys = k.float()
        distance = (keys - keys.gather(1, _rows(into, keys))).norm(dim=-1)

        zeros = torch.zeros_like(distance)
        total = zeros.scatter_add(1, into, distance * merged)
        count = zeros.scatter_add(1, into, merged.float())
        sigma = (total / count.clamp_min(1) / math.sqrt(2)).gather(1, into)
        kernel = torch.exp(-((distance / sigma).nan_to_num() ** 2) / 2)  # 0 / 0: equal keys
        weight = kernel * merged
        changed = zeros.scatter_add(1, into, weight) > 0
        new = (_averaged(x, weight, into)[changed] for x in (k, v))
        return Merged(changed, *new)


def _pivots(view: LayerView, scores: Tensor, among: Tensor, threshold: float) -> Tensor:
    """For every token the token of its set with the highest score, the earlier of equals.

    Args:
        view: the layer; scores: [kv_heads, tokens], +inf where a token is no part of any set.
        among: which tokens can be pivots, bool [kv_heads, tokens].
        threshold: cosine similarity above which neighbours are in one set.

    Returns:
        Token indices, int64 [kv_heads, tokens]; `tokens` where the set has no pivot.
    """
    n = scores.shape[1]
    free = view.cached & ~scores.isposinf()
    keys = torch.nn.functional.normalize(view.keys_values()[0].float(), dim=-1)
    similar = (keys[:, 1:] * keys[:, :-1]).sum(-1) > threshold
    begins = torch.ones_like(free)
    begins[:, 1:] = ~(similar & free[:, 1:] & free[:, :-1])
    sets = begins.cumsum(1) - 1

    candidates = scores.masked_fill(~among, -torch.inf)
    best = torch.full_like(scores, -torch.inf).scatter_reduce(1, sets, candidates, "amax")
    places = torch.arange(n, device=scores.device).expand_as(sets)
    first = torch.where(among & (scores == best.gather(1, sets)), places, n)
    return torch.full_like(sets, n).scatter_reduce(1, sets, first, "amin").gather(1, sets)


def _averaged(x: Tensor, weight: Tensor, into: Tensor) -> Tensor:
    """Rows [kv_heads, tokens, dim] with weight 1, averaged with those of `weight` [kv_heads,
    tokens] that go `into` them [kv_heads, tokens]; in x's dtype."""
    rows = x.float()
    rows = rows.scatter_add(1, _rows(into, rows), weight[..., None] * rows)
    total = torch.ones_like(weight).scatter_add(1, into, weight)
    return (rows / total[..., None]).to(x.dtype)


def _rows(index: Tensor, like: Tensor) -> Tensor:
    """`index` [kv_heads, tokens] for gathering or scattering whole rows of `like`."""
    return index[..., None].expand_as(like)
