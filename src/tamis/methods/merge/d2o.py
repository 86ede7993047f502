"""D2O: evicted tokens join the kept token whose key is most like theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.attention.nearest import nearest
from tamis.methods.base import Evict, Merge, budget_param, param
from tamis.methods.evict.recent import keep_recent_and_top
from tamis.methods.views import LayerView, Merged, Needs

_PAPER = (
    "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language "
    "Models (arXiv:2406.13035)"
)
_STATE = "d2o.threshold"


@dataclass(frozen=True)
class D2OEviction(Evict):
    """The token-level eviction of D2O: the tokens with the most attention, and the recent ones.

    As H2O, but with heavy to recent tokens as 3 to 1. It acts at the prompt's end,
    when the whole prompt has been read, and then for every generated token.
    """

    paper = _PAPER
    query_dependent = True
    interval = 1  # generated tokens between two evictions

    budget: int | float = budget_param(0.2)
    heavy: float = param(0.75, "share of the budget for heavy hitters", minimum=0, maximum=1)

    def needs(self) -> Needs:
        return Needs(attention=True)

    def scores(self, view: LayerView) -> Tensor:
        """Accumulated attention."""
        return view.attention()

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """The newest tokens of each head's budget, then its heavy hitters."""
        heavy_hitters = (self.heavy * budget).round().long()
        return keep_recent_and_top(view, scores, budget - heavy_hitters, budget)


@dataclass(frozen=True)
class D2O(Merge):
    """Evicted tokens that are similar enough to a kept one are merged into it, others dropped.

    With u_ij the cosine similarity of evicted key i and kept key j (its token-level strategy):

        nearest       c(i) = argmax_j u_ij
        threshold     tau_0 = mean_i max_j u_ij,
                      tau_t = beta mean_i max_j u_ij + (1 - beta) tau_{t-1}
        merged        i joins c(i) if u_ic(i) >= tau_t
        new key of j  (e k_j + sum_i exp(u_ij) k_i) / (e + sum_i exp(u_ij)), i merged into j

    and values with the same weights. The threshold is kept per layer and KV head. Paper defaults:
    beta 0.7, heavy to recent tokens 3 to 1.

    Departures. The paper's eviction loses one token per generated one, so its tau_t has no mean;
    here several may go at once. Keys are compared and averaged as they are cached, rotated. The
    layer-level half of D2O, budgets by the variance of a layer's attention, is the business of the
    stage `budget`; compose with one of its methods.

    Without another eviction in the plan, the token-level eviction of D2O is in it, with `budget`
    and `heavy`, which are refused beside another.
    """

    paper = _PAPER
    query_dependent = True
    of_eviction = ("budget", "heavy")

    budget: int | float = budget_param(0.2)
    heavy: float = param(0.75, "share of the budget for heavy hitters", minimum=0, maximum=1)
    beta: float = param(0.7, "weight of the newest in the threshold", above=0, maximum=1)

    def eviction(self) -> D2OEviction:
        return D2OEviction(self.budget, self.heavy)

    def merge(self, view: LayerView, scores: Tensor, kept: Tensor) -> Merged:
        k, v = view.keys_values()
        heads, n, _ = k.shape
        evicted = view.cached & ~kept
        leaves = evicted.any(1) & kept.any(1)
        found = [_nearest(k[h], evicted[h], kept[h]) for h in leaves.nonzero()[:, 0].tolist()]
        evicted &= leaves[:, None]
        head, own = evicted.nonzero(as_tuple=True)
        similarity = torch.cat([k.new_zeros(0, dtype=torch.float32), *(one[0] for one in found)])
        nearest = torch.cat([head[:0], *(one[1] for one in found)])

        before = view.state.get(_STATE, k.new_full((heads,), torch.nan, dtype=torch.float64))
        mean = torch.zeros_like(before).index_add(0, head, similarity.double()) / evicted.sum(1)
        after = torch.where(before.isnan(), mean, self.beta * mean + (1 - self.beta) * before)
        view.state[_STATE] = torch.where(leaves, after, before)
        joins = similarity >= after[head]

        weight = similarity[joins].exp() / math.e  # of the evicted, that of the kept being 1
        from_ = (head * n + own)[joins]
        to, place = torch.unique((head * n + nearest)[joins], return_inverse=True)
        tokens = torch.zeros_like(kept).view(-1).index_fill(0, to, True).view_as(kept)
        new = (_averaged(x.flatten(0, 1), to, from_, weight, place) for x in (k, v))
        return Merged(tokens, *new)


def _nearest(k: Tensor, evicted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each evicted token of a head its highest cosine similarity to a kept one, fp32 [m], and
    which token that is, int64 [m].

    Args:
        k: [tokens, dim]; evicted, kept: which tokens, bool [tokens].
    """
    stay = kept.nonzero()[:, 0]
    similarity, place = nearest(k[evicted], k[stay])
    return similarity, stay[place]


def _averaged(x: Tensor, to: Tensor, from_: Tensor, weight: Tensor, place: Tensor) -> Tensor:
    """Rows x[to] of weight 1, averaged with rows x[from_] of `weight`, each of which goes into
    the row at its `place`; like `x` [tokens, dim]."""
    rows = x[to].float().index_add(0, place, weight[:, None] * x[from_].float())
    total = weight.new_ones(len(to)).index_add(0, place, weight)
    return (rows / total[:, None]).to(x.dtype)
