"""Attention by its definition, in fp64, one query head at a time; and pages filled with tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tamis.attention import native, reference
from tamis.cache.format import PagedKV, PageFormat
from tamis.platform import native_module

BACKENDS = ["reference", *(native_module(warn=False).isas() if native_module(warn=False) else ())]
"""The reference, and the native kernels of every instruction set that this machine runs."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""What rounding may cost a result of size 1, by dtype of queries, keys and values."""


def implementation(function: str, backend: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """ "decode" or "prefill" by one of BACKENDS."""
    if backend == "reference":
        return getattr(reference, function)
    return partial(getattr(native, function), native_module(), isa=backend)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink: float | None = None,
) -> tuple[torch.Tensor, float]:
    """One query q [k_dim] over the tokens k [tokens, k_dim], v [tokens, v_dim]: out and lse."""
    scores = (k.double() @ q.double()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    logits = scores if sink is None else torch.cat([scores, torch.tensor([sink]).double()])
    if len(logits) == 0:
        return torch.zeros(v.shape[1], dtype=torch.float64), -math.inf
    weights = torch.softmax(logits, 0)[: len(scores)]
    return weights @ v.double(), torch.logsumexp(logits, 0).item()


@dataclass
class Cached:
    """Tokens in pages, and the same tokens as plain tensors: k[row][head] is [tokens, k_dim]."""

    kv: PagedKV
    k: list[list[torch.Tensor]]
    v: list[list[torch.Tensor]]
    positions: list[list[torch.Tensor]]


def cached(
    lengths: Sequence[Sequence[int]],
    *,
    page_size: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    gap: int = 1,
) -> Cached:
    """Random tokens of `lengths[row][head]`, on pages in random order.

    Positions ascend in steps of 1..gap. All memory that holds no token is NaN, so that a kernel
    that reads beyond a head's tokens shows it; spare table entries point outside of the arena.
    """
    format = PageFormat.dense(page_size, k_dim, v_dim, dtype)
    counts = [[format.pages_for(length) for length in row] for row in lengths]
    n_pages = sum(map(sum, counts))
    data = torch.full((max(1, n_pages) * format.page_bytes,), 0xFF, dtype=torch.uint8)
    free = (torch.randperm(n_pages) * (format.page_bytes // 64)).tolist()
    widest = max((count for row in counts for count in row), default=0) + 1
    tables = torch.full((len(lengths), len(lengths[0]), widest), 2**31 - 1, dtype=torch.int32)
    k = [[torch.randn(length, k_dim).to(dtype) for length in row] for row in lengths]
    v = [[torch.randn(length, v_dim).to(dtype) for length in row] for row in lengths]
    positions = [
        [torch.randint(1, gap + 1, (length,)).cumsum(0).int() - 1 for length in row]
        for row in lengths
    ]
    for row, heads in enumerate(lengths):
        for head, length in enumerate(heads):
            pages = [free.pop() for _ in range(counts[row][head])]
            tables[row, head, : len(pages)] = torch.tensor(pages)
            fields = {"k": k, "v": v, "position": positions}
            for name, tokens in fields.items():
                view = format.view(data, name)
                for token in range(length):
                    view[pages[token // page_size], token % page_size] = tokens[row][head][token]
    kv = PagedKV(data, format, tables, torch.tensor(lengths, dtype=torch.int32))
    return Cached(kv, k, v, positions)
