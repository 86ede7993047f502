"""What PyramidInfer does alike in the prompt and afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Evict, param
from tamis.methods.views import LayerView, Needs, top_mask


def kept_share(least: float, layer: int, n_layers: int) -> float:
    """The share of the context that a layer keeps: a half cosine from 1 down to `least`."""
    return least + (1 - least) * (1 + math.cos(math.pi * layer / n_layers)) / 2


def context_length(tokens: int, recent: float) -> int:
    """Of so many tokens, those before the recent ones: the newest and a share of all."""
    return max(0, tokens - 1 - int(recent * tokens))


def importance(weights: Tensor, recents: int, distance: float) -> Tensor:
    """Attention of recent tokens, newer ones counting more.

    Args:
        weights: softmax weights of the last queries, [q_heads, m, tokens].
        recents: how many recent tokens there are; the last m of them are the queries.
        distance: what the newest query counts, where the oldest of the recent tokens counts 1.

    Returns:
        Mean over heads and queries, fp32 [tokens].
    """
    counts = torch.linspace(1.0, distance, recents, device=weights.device)[-weights.shape[1] :]
    return (weights * counts[:, None]).mean((0, 1))


@dataclass(frozen=True)
class PyramidGeneration(Evict):
    """PyramidInfer while it generates: once in `interval` tokens, of the generated tokens that have
    left the recent ones since, every layer keeps a share, the more the shallower it is.

    The prompt's tokens are left alone, like what an earlier round kept. All heads of a layer keep
    the same tokens.
    """

    paper: ClassVar[str] = (
        "PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference "
        "(arXiv:2405.12532)"
    )
    query_dependent: ClassVar[bool] = True
    budget = 1  # every layer is asked, whatever it holds: its share decides

    least: float = param(0.1, "share that the deepest layer keeps", above=0, maximum=1)
    recent: float = param(0.2, "share of the tokens that is recent", minimum=0, maximum=1)
    distance: float = param(1.2, "weight of the newest query, the oldest's being 1", above=0)
    queries: int = param(64, "last queries that judge", minimum=1)
    every: int = param(16, "generated tokens between two rounds", minimum=1)

    @property
    def interval(self) -> int:
        return self.every

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def scores(self, view: LayerView) -> Tensor:
        """Importance of the tokens under judgement, the same for all heads; +inf of the others."""
        judged = self._judged(view)
        scores = torch.full(judged.shape, torch.inf, device=judged.device)
        if judged.any():
            tokens = int(view.positions.max()) + 1
            recents = tokens - context_length(tokens, self.recent)
            weights = view.window(min(self.queries, recents))
            shared = importance(weights, recents, self.distance).expand_as(scores)
            scores = torch.where(judged, shared, scores)
        return scores

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """Everything but the least important of those under judgement; of each round one stays."""
        judged = self._judged(view).sum(1)
        share = kept_share(self.least, view.layer, view.shape.n_layers)
        stay = (share * judged.double()).long().clamp_min(1)
        return view.cached & top_mask(scores, scores.shape[1] - judged + stay)

    def _judged(self, view: LayerView) -> Tensor:
        """Generated tokens that were recent a round ago and are no more, bool like `cached`."""
        tokens = int(view.positions.max()) + 1
        begin = max(view.prompt_tokens, context_length(tokens - self.every, self.recent))
        end = context_length(tokens, self.recent)
        return view.cached & (view.positions >= begin) & (view.positions < end)
