"""A decode step's view from explicit tensors, by the definitions of `DecodeView`: no pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamis.methods.base import Select
from tamis.methods.views import LayerShape, ModelShape


@dataclass
class NaiveDecodeView:
    """`DecodeView` over the tensors of one layer; pages are `page_size` tokens each."""

    layer: int
    shape: ModelShape
    prompt_tokens: int
    q: Tensor
    lengths: Tensor
    page_size: int
    scale: float
    state: dict[str, Any]
    k: Tensor
    v: Tensor
    method: Select | None

    def summary(self, name: str) -> Tensor:
        assert self.method is not None, "asks for a summary that no method declares"
        declared = {c.name: c for c in self.method.summaries(self.q.shape[1], self.k.dtype)}
        full = self.lengths // self.page_size
        result = torch.full((len(self.k), int(full.max()), declared[name].width), torch.nan)
        for head in range(len(self.k)):
            for page in range(int(full[head])):
                keys = self.k[head, page * self.page_size : (page + 1) * self.page_size]
                result[head, page] = self.method.summarize(keys)[name]
        return result

    def top_pages(self, low: str, high: str, count: int) -> Tensor:
        least, most = self.summary(low), self.summary(high)
        group = len(self.q) // len(self.k)
        rows = []
        for head, length in enumerate(self.lengths.tolist()):
            last = (length - 1) // self.page_size
            bound = {last: math.inf}
            for page in range(last):
                ends = torch.stack([least[head, page], most[head, page]])
                queries = self.q[head * group : (head + 1) * group].float()
                bound[page] = max(float((ends * q).amax(0).sum()) for q in queries)
            chosen = sorted(bound, key=lambda page: (-bound[page], page))[:count]
            rows.append(sorted(chosen) + [last + 1 + i for i in range(count - len(chosen))])
        return torch.tensor(rows)

    def weights(
        self,
        *,
        channels: Tensor | None = None,
        divisors: Tensor | None = None,
        first: int = 0,
        last: int = 0,
    ) -> Tensor:
        group = len(self.q) // len(self.k)
        result = torch.zeros(len(self.q), self.k.shape[1])
        for head, q in enumerate(self.q):
            used = slice(None) if channels is None else channels[head // group]
            tokens = slice(first, max(first, int(self.lengths[head // group]) - last))
            scores = self.k[head // group, tokens][:, used].float() @ q[used].float() * self.scale
            result[head, tokens] = (
                scores if divisors is None else scores / divisors[head]
            ).softmax(0)
        return result

    def top_tokens(self, values: Tensor, count: int, *, first: int = 0, last: int = 0) -> Tensor:
        lengths = self.lengths.tolist() if len(values) == len(self.k) else [int(self.lengths.max())]
        rows = []
        for row, length in zip(values, lengths, strict=True):
            ends = [*range(first), *range(length - 1, max(first, length - last) - 1, -1)]
            between = range(first, length - last)
            best = sorted(between, key=lambda token: (-float(row[token]), token))
            chosen = [token for token in [*ends, *best] if token < length][:count]
            rows.append(sorted(chosen) + [length + i for i in range(count - len(chosen))])
        return torch.tensor(rows)

    def mean_value(self) -> Tensor:
        assert self.method is None or self.method.needs().mean_value, "asks without declaring it"
        pairs = zip(self.v, self.lengths.tolist(), strict=True)
        return torch.stack([v[:length].float().mean(0) for v, length in pairs])


def decode_view(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    lengths: Tensor | list[int] | None = None,
    page_size: int = 4,
    scale: float | None = None,
    layer: int = 0,
    shape: ModelShape | None = None,
    prompt_tokens: int | None = None,
    method: Select | None = None,
    state: dict[str, Any] | None = None,
) -> NaiveDecodeView:
    """The view of a step whose query meets these keys and values.

    Args:
        q: [q_heads, k_dim].
        k: [kv_heads, tokens, k_dim], the new token's among them; v: [kv_heads, tokens, v_dim],
            by default the keys.
        lengths: real tokens per head; by default all.
        page_size: tokens per page.
        scale: by default k_dim ** -0.5.
        layer, shape: by default layer 0 of a model of that one layer (or of `layer + 1` such).
        prompt_tokens: by default the tokens that k has, but one.
        method: whose summaries the cache keeps.
        state: what the methods remembered so far.
    """
    kv_heads, tokens, k_dim = k.shape
    v = k if v is None else v
    if shape is None:
        own = LayerShape(len(q), kv_heads, k_dim, v.shape[-1])
        shape = ModelShape((own,) * (layer + 1), vocab_size=16, dtype=k.dtype)
    return NaiveDecodeView(
        layer=layer,
        shape=shape,
        prompt_tokens=tokens - 1 if prompt_tokens is None else prompt_tokens,
        q=q,
        lengths=torch.full((kv_heads,), tokens) if lengths is None else torch.as_tensor(lengths),
        page_size=page_size,
        scale=1 / math.sqrt(k_dim) if scale is None else scale,
        state={} if state is None else state,
        k=k,
        v=v,
        method=method,
    )
