"""MInference's offline search: which pattern loses least in each head at the same cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tamis.attention import prefill
from tamis.attention.observe import pooled
from tamis.attention.pattern import SparsePattern
from tamis.methods.prefill.patterns import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, head_patterns
from tamis.methods.views import LayerShape, ModelShape
from tamis.model import Model
from tamis.train.methods.save import stacked

NAMES = {A_SHAPE: "A-shape", VERTICAL_SLASH: "vertical-slash", BLOCK_SPARSE: "block-sparse"}

CANDIDATES = (
    (A_SHAPE, 1024, 4096),
    (VERTICAL_SLASH, 30, 2048),
    (VERTICAL_SLASH, 100, 1800),
    (VERTICAL_SLASH, 500, 1500),
    (VERTICAL_SLASH, 3000, 200),
    (BLOCK_SPARSE, 100, 0),
)
"""Kinds, and the proportion of their two sizes: the paper's search space (its appendix). The sizes
themselves are scaled until all cost the same."""


@dataclass(frozen=True)
class Found:
    """What is best in every head; layers with fewer heads are padded with 0, and so are layers
    with a sliding window, where MInference does nothing.

    Attributes:
        kind: int64 [layers, most query heads], as `tamis.methods.prefill.patterns` numbers them.
        size: int64 [layers, most query heads, 2].
        error: squared error of the head's output by that of nothing, fp32 [layers, most heads].
    """

    kind: Tensor
    size: Tensor
    error: Tensor


@dataclass
class WholePrompt:
    """A `ChunkView` of a whole text whose keys are at hand: one chunk, nothing cached before."""

    layer: int
    shape: ModelShape
    q: Tensor
    k: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    prompt_tokens: int = field(init=False)
    lengths: Tensor = field(init=False)
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.q)
        self.lengths = torch.zeros(self.k.shape[1], dtype=torch.long, device=self.k.device)

    def window(self, n: int) -> Tensor:
        q, k = self.q[-n:].float(), self.k.float()
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])
        scores = self.scale * torch.einsum("qhgd,khd->hgqk", grouped, k).flatten(0, 1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(later, -torch.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        extra = self.sinks.float()[:, None, None].expand(*scores.shape[:2], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]

    def pooled_queries(self, block: int) -> Tensor:
        return pooled(self.q, block)

    def pooled_keys(self, block: int) -> Tensor:
        return pooled(self.k, block)


class PatternSearch:
    """An `Attend` that attends in full, and tries every candidate on every head.

    Args:
        model: that calls it; keys: pairs per query that a candidate computes.
        report: called after each layer with its index.
    """

    def __init__(self, model: Model, keys: int, report: Callable[[int], None]) -> None:
        layers = tuple(
            LayerShape(one.q_heads, one.kv_heads, one.k_dim, one.v_dim, one.window)
            for one in model.layers
        )
        self._shape = ModelShape(layers, model.vocab_size, model.dtype)
        self._keys, self._report = keys, report
        self.kind: list[Tensor] = []
        self.size: list[Tensor] = []
        self.error: list[Tensor] = []

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        at = torch.arange(len(q), device=q.device)
        attend = partial(
            prefill, q, k, v, None,
            scale=scale, positions=at, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        out = attend()[0]
        best = out.new_full((q.shape[1],), torch.inf, dtype=torch.float32)
        kind, size = best.new_zeros(len(best)).long(), best.new_zeros(len(best), 2).long()
        if window is None:
            view = WholePrompt(layer, self._shape, q, k, scale, softcap, sinks)
            whole = out.float().square().sum((0, 2))
            for candidate in CANDIDATES:
                sizes, pattern = at_cost(view, candidate, self._keys)
                tried = attend(pattern=pattern)[0]
                error = (tried.float() - out.float()).square().sum((0, 2)) / whole
                better = error < best
                best = torch.where(better, error, best)
                kind[better] = candidate[0]
                size[better] = torch.tensor(sizes, device=size.device)
        self.kind.append(kind)
        self.size.append(size)
        self.error.append(best.nan_to_num(posinf=0.0))
        self._report(layer)
        return out


def at_cost(
    view: WholePrompt, candidate: tuple[int, int, int], keys: int
) -> tuple[tuple[int, int], SparsePattern | None]:
    """The largest sizes in a candidate's proportion with which a query reads at most `keys` keys
    on average over queries and heads (or the smallest there are), and their pattern."""
    kind, first, second = candidate
    n, q_heads = len(view.q), view.q.shape[1]

    def pattern_of(scale: int) -> tuple[tuple[int, int], SparsePattern | None]:
        sizes = (max(1, scale * first // (first + second)), scale * second // (first + second))
        size = torch.tensor(sizes, device=view.q.device).expand(q_heads, 2)
        return sizes, head_patterns(view, torch.full_like(size[:, 0], kind), size)

    def cost(pattern: SparsePattern | None) -> float:
        share = 1.0 if pattern is None else pattern.density(view.lengths, n)
        return share * (n + 1) / 2

    low, high = 1, n
    while low < high:
        middle = (low + high + 1) // 2
        if cost(pattern_of(middle)[1]) <= keys:
            low = middle
        else:
            high = middle - 1
    return pattern_of(low)


def fit(
    model: Model, ids: Tensor, *, keys: int, report: Callable[[int], None] = lambda _: None
) -> Found:
    """For every query head the pattern with the least output error on a text (MInference,
    algorithm "kernel-aware optimal head pattern search").

    The search space is the paper's: one A-shape, four vertical-slash and one block-sparse
    candidate, scaled so that all compute as many pairs. The error is that of the head's output
    over the whole text. The paper searches on one synthetic document of 30 thousand tokens; sizes
    are numbers of tokens and do not grow with the prompt.

    Args:
        ids: the text, int64 [tokens].
        keys: keys that a query may read on average; the cost of every candidate.
        report: called after each layer with its index.
    """
    at = torch.arange(len(ids), device=model.device)
    search = PatternSearch(model, keys, report)
    model.forward(
        ids.to(model.device), at, at[:0], search, rope_lengths=torch.full_like(at, len(ids))
    )
    return Found(stacked(search.kind), stacked(search.size), stacked(search.error))
