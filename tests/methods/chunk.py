"""A chunk's view from explicit tensors, by the definitions of `ChunkView`: no pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamis.attention.pattern import SparsePattern
from tamis.methods.views import LayerShape, ModelShape


@dataclass
class NaiveChunkView:
    """`ChunkView` over the tensors of one layer."""

    layer: int
    shape: ModelShape
    prompt_tokens: int
    q: Tensor
    lengths: Tensor
    state: dict[str, Any]
    k: Tensor
    scale: float

    def window(self, n: int) -> Tensor:
        tokens, q_heads, _ = self.q.shape
        first = max(0, tokens - n)
        reach = self.shape.layers[self.layer].window or self.k.shape[1]
        weights = torch.zeros(q_heads, tokens - first, self.k.shape[1])
        for head in range(q_heads):
            kv_head = head // (q_heads // len(self.k))
            for query in range(first, tokens):
                own = int(self.lengths[kv_head]) + query
                seen = slice(max(0, own - reach + 1), own + 1)
                products = self.k[kv_head, seen].float() @ self.q[query, head].float()
                weights[head, query - first, seen] = (products * self.scale).softmax(0)
        return weights

    def pooled_queries(self, block: int) -> Tensor:
        return torch.stack([part.float().mean(0) for part in self.q.split(block)], dim=1)

    def pooled_keys(self, block: int) -> Tensor:
        pooled = torch.zeros(len(self.k), -(-self.k.shape[1] // block), self.k.shape[2])
        for head, length in enumerate(self.lengths.tolist()):
            for index, part in enumerate(self.k[head, : length + len(self.q)].split(block)):
                pooled[head, index] = part.float().mean(0)
        return pooled


def chunk_view(
    q: Tensor,
    k: Tensor,
    *,
    lengths: Tensor | list[int] | None = None,
    prompt_tokens: int | None = None,
    scale: float | None = None,
    layer: int = 0,
    shape: ModelShape | None = None,
    state: dict[str, Any] | None = None,
) -> NaiveChunkView:
    """The view of a chunk with these queries and keys.

    Args:
        q: the chunk's queries, [tokens, q_heads, k_dim].
        k: per head its cached keys and then the chunk's own, [kv_heads, keys, k_dim]; what lies
            beyond `lengths[h] + tokens` is not there.
        lengths: cached keys per head; by default all but the chunk's own.
        prompt_tokens: by default the keys that k has.
        scale: by default k_dim ** -0.5.
        layer, shape: by default layer 0 of a model of that one layer (or of `layer + 1` such).
        state: what the methods remembered so far.
    """
    kv_heads, keys, k_dim = k.shape
    if shape is None:
        own = LayerShape(q.shape[1], kv_heads, k_dim, k_dim)
        shape = ModelShape((own,) * (layer + 1), vocab_size=16, dtype=k.dtype)
    if lengths is None:
        lengths = torch.full((kv_heads,), keys - len(q))
    return NaiveChunkView(
        layer=layer,
        shape=shape,
        prompt_tokens=keys if prompt_tokens is None else prompt_tokens,
        q=q,
        lengths=torch.as_tensor(lengths),
        state={} if state is None else state,
        k=k,
        scale=1 / math.sqrt(k_dim) if scale is None else scale,
    )


def visible_pairs(pattern: SparsePattern, view: NaiveChunkView) -> Tensor:
    """Which (query, key) pairs a pattern computes, pair by pair: bool [q_heads, tokens, keys]."""
    tokens, q_heads, _ = view.q.shape
    pairs = torch.zeros(q_heads, tokens, view.k.shape[1], dtype=torch.bool)
    for head in range(q_heads):
        length = int(view.lengths[head // (q_heads // len(view.k))])
        columns = pattern.columns[pattern.column_starts[head] : pattern.column_starts[head + 1]]
        for query in range(tokens):
            starts = pattern.block_starts[head]
            row = query // pattern.block
            for block in pattern.blocks[starts[row] : starts[row + 1]].tolist():
                pairs[head, query, block * pattern.block : (block + 1) * pattern.block] = True
            pairs[head, query, columns.long()] = True
            if pattern.window is not None:
                first = max(0, length + query + 1 - int(pattern.window[head]))
                pairs[head, query, first : length + query + 1] = True
            if pattern.full is not None and pattern.full[head]:
                pairs[head, query] = True
            pairs[head, query, length + query + 1 :] = False
    return pairs
