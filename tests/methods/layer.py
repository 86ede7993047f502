"""A view of explicit tensors, by the definitions of `LayerView`: full softmax, no pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamis.methods.base import Merge
from tamis.methods.views import LayerShape, ModelShape


@dataclass
class NaiveLayerView:
    """`LayerView` over the tensors of one layer."""

    layer: int
    shape: ModelShape
    prompt_tokens: int
    lengths: Tensor
    positions: Tensor
    state: dict[str, Any]
    k: Tensor
    v: Tensor
    q: Tensor
    scale: float
    given_attention: Tensor | None
    given_similarity: float | None

    @property
    def cached(self) -> Tensor:
        return torch.arange(self.k.shape[1]) < self.lengths[:, None]

    def queries(self, n: int) -> Tensor:
        return self.q[max(0, len(self.q) - n) :]

    def window(self, n: int) -> Tensor:
        q = self.queries(n)
        newest = int(self.positions.max())
        query_positions = torch.arange(newest - len(q) + 1, newest + 1)[:, None]
        reach = self.shape.layers[self.layer].window or newest + 1
        group = q.shape[1] // len(self.k)
        weights = torch.zeros(q.shape[1], len(q), self.k.shape[1])
        for head in range(q.shape[1]):
            kv_head = head // group
            age = query_positions - self.positions[kv_head]
            seen = self.cached[kv_head] & (age >= 0) & (age < reach)
            products = q[:, head].float() @ self.k[kv_head].float().T * self.scale
            softmax = products.masked_fill(~seen, -torch.inf).softmax(-1)
            weights[head] = softmax.nan_to_num(0.0)  # a query that sees nothing
        return weights

    def attention(self) -> Tensor:
        assert self.given_attention is not None, "asks for attention sums that it does not declare"
        return self.given_attention

    def similarity(self) -> float:
        assert self.given_similarity is not None, "asks for a similarity that it does not declare"
        return self.given_similarity

    def keys_values(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        real = self.cached[:, start:stop, None]
        return self.k[:, start:stop] * real, self.v[:, start:stop] * real


def layer_view(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    *,
    lengths: Tensor | list[int] | None = None,
    positions: Tensor | None = None,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    layer: int = 0,
    shape: ModelShape | None = None,
    attention: Tensor | None = None,
    similarity: float | None = None,
    state: dict[str, Any] | None = None,
) -> NaiveLayerView:
    """The view of a layer with these keys, values and last queries.

    Args:
        k: [kv_heads, tokens, k_dim]; v: [kv_heads, tokens, v_dim].
        q: the last queries, [w, q_heads, k_dim]; the last of them at the largest position.
        lengths: real tokens per head; by default all.
        positions: int64 [kv_heads, tokens]; by default 0, 1, 2, ... What lies beyond a head's
            length becomes -1.
        prompt_tokens: by default the tokens that k has.
        scale: by default k_dim ** -0.5.
        layer, shape: by default layer 0 of a model of that one layer (or of `layer + 1` such).
        attention: what `attention()` gives, fp32 [kv_heads, tokens].
        similarity: what `similarity()` gives.
        state: what the methods remembered so far.
    """
    kv_heads, tokens, k_dim = k.shape
    if shape is None:
        own = LayerShape(q.shape[1], kv_heads, k_dim, v.shape[-1])
        shape = ModelShape((own,) * (layer + 1), vocab_size=16, dtype=k.dtype)
    if lengths is None:
        lengths = torch.full((kv_heads,), tokens)
    lengths = torch.as_tensor(lengths)
    if positions is None:
        positions = torch.arange(tokens).expand(kv_heads, tokens)
    return NaiveLayerView(
        layer=layer,
        shape=shape,
        prompt_tokens=tokens if prompt_tokens is None else prompt_tokens,
        lengths=lengths,
        positions=positions.masked_fill(torch.arange(tokens) >= lengths[:, None], -1),
        state={} if state is None else state,
        k=k,
        v=v,
        q=q,
        scale=1 / math.sqrt(k_dim) if scale is None else scale,
        given_attention=attention,
        given_similarity=similarity,
    )


def after_merge(
    method: Merge, view: NaiveLayerView, scores: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of a view after a merge, evicted ones as they were."""
    result, (k, v) = method.merge(view, scores, kept), view.keys_values()
    assert not (result.tokens & ~kept).any(), "an evicted token changes"
    k, v = k.clone(), v.clone()
    k[result.tokens], v[result.tokens] = result.k, result.v
    return k, v
