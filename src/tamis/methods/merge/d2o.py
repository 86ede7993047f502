"""D2O: evicted tokens join the kept token whose key is most like theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.methods.base import Evict, Merge, budget_param, param
from tamis.methods.evict.recent import keep_recent_and_top
from tamis.methods.views import LayerView, Needs

_PAPER = (
    "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language "
    "Models (arXiv:2406.13035)"
)
_BLOCK = 1024  # evicted tokens that are compared with all kept ones at once
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

    def merge(self, view: LayerView, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        k, v = view.keys_values()
        evicted = view.cached & ~kept
        before = view.state.get(_STATE, torch.full((len(k),), torch.nan))  # nothing evicted yet
        after = before.clone()
        k_new, v_new = k.clone(), v.clone()
        for head in range(len(k)):
            stay, go = kept[head].nonzero()[:, 0], evicted[head].nonzero()[:, 0]
            if not len(go) or not len(stay):
                continue
            similarity, nearest = _nearest(k[head, go], k[head, stay])
            newest, old = float(similarity.double().mean()), float(before[head])
            threshold = newest if math.isnan(old) else self.beta * newest + (1 - self.beta) * old
            after[head] = threshold
            weight = similarity.exp() * (similarity >= threshold)
            for x, new in ((k, k_new), (v, v_new)):
                new[head, stay] = _averaged(x[head, stay], x[head, go], weight, nearest).to(x.dtype)
        view.state[_STATE] = after
        return k_new, v_new


def _nearest(evicted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each evicted key [m, dim] its highest cosine similarity to a kept key [n, dim], fp32 [m],
    and which key that is, int64 [m]; in blocks, so that m x n is never held."""
    targets = torch.nn.functional.normalize(kept.float(), dim=-1)
    found = [
        (torch.nn.functional.normalize(block.float(), dim=-1) @ targets.T).max(1)
        for block in torch.split(evicted, _BLOCK)
    ]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _averaged(kept: Tensor, evicted: Tensor, weight: Tensor, into: Tensor) -> Tensor:
    """Kept rows [n, dim] with weight e, averaged with the evicted rows [m, dim] of `weight` [m]
    that go `into` them [m]; fp32 [n, dim]."""
    rows = kept.float()
    weight = weight / math.e  # so that rows that nothing joins stay as they are to the bit
    total = torch.ones_like(rows[:, 0]).index_add_(0, into, weight)
    return rows.index_add(0, into, weight[:, None] * evicted.float()) / total[:, None]
