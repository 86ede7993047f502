"""Attention by its definition, in fp64, one query head at a time; and pages filled with tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tamis.attention import native, reference
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.cache.format import PagedKV, PageFormat
from tamis.platform import native_module
from tests.instruction_sets import isas

BACKENDS = ["reference", *isas()]
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


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: Cached | None,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    pattern: SparsePattern | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill by its definition, query by query: fp64 out [tokens, q_heads, v_dim] and lse."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.zeros(q.shape[:2], dtype=torch.float64)
    for head in range(q.shape[1]):
        keys, values, at = k[:, head // group], v[:, head // group], positions
        if past is not None:
            before = (x[0][head // group] for x in (past.k, past.v, past.positions))
            keys, values, at = (
                torch.cat(pair) for pair in zip(before, (keys, values, at), strict=True)
            )
        older = len(at) - len(q)
        for i in range(len(q)):
            seen = torch.arange(len(at)) <= older + i
            if window is not None:
                seen &= at > positions[i] - window
            if pattern is not None:
                seen &= pattern_row(pattern, head, i, older, len(at))
            sink = sinks[head].item() if sinks is not None else None
            out[i, head], lse[i, head] = attend(
                q[i, head], keys[seen], values[seen], scale=scale, softcap=softcap, sink=sink
            )
    return out, lse


def pattern_row(
    pattern: SparsePattern, head: int, query: int, length: int, keys: int
) -> torch.Tensor:
    """Which keys a query sees by its pattern's definition, but for causality: bool [keys]."""
    if pattern.full is not None and pattern.full[head]:
        return torch.ones(keys, dtype=torch.bool)
    first, last = pattern.block_starts[head, query // pattern.block :][:2].tolist()
    named = set()
    for block in pattern.blocks[first:last].tolist():
        named.update(range(block * pattern.block, (block + 1) * pattern.block))
    first, last = pattern.column_starts[head : head + 2].tolist()
    named.update(pattern.columns[first:last].tolist())
    if pattern.window is not None:
        at = length + query
        named.update(range(at - int(pattern.window[head]) + 1, at + 1))
    return torch.tensor([key in named for key in range(keys)])


def decode(
    q: torch.Tensor,
    cached: Cached,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tokens: TokenList | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode by its definition: fp64 out [n, q_heads, v_dim] and lse [n, q_heads]."""
    group = q.shape[1] // len(cached.k[0])
    outs, lses = [], []
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            source = row, head // group
            k, v, at = (x[source[0]][source[1]] for x in (cached.k, cached.v, cached.positions))
            if tokens is not None:
                listed = tokens.indices[source][: tokens.counts[source]].long()
                k, v, at = k[listed], v[listed], at[listed]
            if window is not None:
                seen = at > positions[row] - window
                k, v = k[seen], v[seen]
            sink = sinks[head].item() if sinks is not None else None
            out, lse = attend(q[row, head], k, v, scale=scale, softcap=softcap, sink=sink)
            outs.append(out)
            lses.append(lse)
    return torch.stack(outs).view(*q.shape[:2], -1), torch.tensor(lses).double().view(q.shape[:2])


def prefill_call(case: dict) -> tuple[tuple, dict]:
    """Positional arguments and options of the prefill that a case describes: `tokens`, `past`
    (cached tokens per head, or None), `kv_heads`, `group`, `k_dim`, `v_dim`, `dtype`, `page_size`,
    `gap`, `softcap`, `window`, `sinks` (whether), `positions_dtype` and `seed`."""
    torch.manual_seed(case["seed"])
    tokens, kv_heads, dtype = case["tokens"], case["kv_heads"], case["dtype"]
    q = torch.randn(tokens, kv_heads * case["group"], case["k_dim"]).to(dtype)
    # As models hand them over: [kv_heads, tokens, dim] transposed.
    k = torch.randn(kv_heads, tokens, case["k_dim"]).to(dtype).transpose(0, 1)
    v = torch.randn(kv_heads, tokens, case["v_dim"]).to(dtype).transpose(0, 1)
    past, first = None, 0
    if case["past"] is not None:
        names = ("page_size", "k_dim", "v_dim", "dtype", "gap")
        past = cached([case["past"]], **{name: case[name] for name in names})
        first = max(int(at[-1]) + 1 if len(at) else 0 for at in past.positions[0])
    options = {
        "scale": case["k_dim"] ** -0.5,
        "positions": torch.arange(first, first + tokens, dtype=case["positions_dtype"]),
        "window": case["window"],
        "softcap": case["softcap"],
        "sinks": torch.randn(q.shape[1]) if case["sinks"] else None,
    }
    return (q, k, v, past), options


def assert_prefill_is_defined(
    implementation: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    arguments: tuple,
    options: dict,
) -> None:
    """An implementation gives what the definition gives, in q's dtype."""
    q, k, v, past = arguments
    out, lse = implementation(q, k, v, past.kv if past is not None else None, **options)
    want_out, want_lse = prefill(q, k, v, past, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), want_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
