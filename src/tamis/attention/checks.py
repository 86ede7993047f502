"""What the public functions of this package demand of their arguments."""

from __future__ import annotations

import torch

from tamis.attention.pattern import SparsePattern, TokenList
from tamis.cache.format import PagedKV

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of queries, keys and values."""


def check_paged(q: torch.Tensor, kv: PagedKV) -> None:
    """Raise ValueError unless queries `q` [n or tokens, q_heads, k_dim] can read `kv`."""
    k, v = kv.format.field("k"), kv.format.field("v")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            "q, k and v must share one dtype of float32, float16, bfloat16; "
            f"got q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    lengths, tables = kv.lengths, kv.tables
    if q.dim() != 3 or q.shape[2] != k.width:
        raise ValueError(f"q must be [tokens, q_heads, {k.width}], got {list(q.shape)}")
    if lengths.dim() != 2 or tables.dim() != 3 or tables.shape[:2] != lengths.shape:
        raise ValueError(
            "tables must be [n, kv_heads, max_pages] and lengths [n, kv_heads], "
            f"got {list(tables.shape)} and {list(lengths.shape)}"
        )
    if lengths.dtype != torch.int32 or tables.dtype != torch.int32:
        raise ValueError(
            f"tables and lengths must be torch.int32, got {tables.dtype} and {lengths.dtype}"
        )
    if q.shape[1] % lengths.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot be shared by {lengths.shape[1]} KV heads: "
            "the first must be a multiple of the second"
        )


def check_options(
    q: torch.Tensor,
    positions: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the options fit the queries `q` [n or tokens, q_heads, k_dim]."""
    if positions is not None and (
        positions.shape != q.shape[:1] or positions.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"positions must be int32 or int64 [{q.shape[0]}], "
            f"got {positions.dtype} {list(positions.shape)}"
        )
    if window is not None and (positions is None or window < 1):
        raise ValueError(f"window needs positions and must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; use None for no bound")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [{q.shape[1]}], got {list(sinks.shape)}")


def check_pattern(q: torch.Tensor, pattern: SparsePattern | None) -> None:
    """Raise ValueError unless the pattern fits the queries `q` [tokens, q_heads, k_dim]."""
    if pattern is None:
        return
    tokens, q_heads = q.shape[:2]
    want = q_heads, -(-tokens // pattern.block)
    if (pattern.q_heads, pattern.q_blocks) != want:
        raise ValueError(
            f"a pattern for {tokens} tokens of {q_heads} heads in blocks of {pattern.block} must "
            f"have {want[0]} heads and {want[1]} query blocks, "
            f"got {pattern.q_heads} and {pattern.q_blocks}"
        )


def check_tokens(kv: PagedKV, tokens: TokenList | None) -> None:
    """Raise ValueError unless `tokens` names cached tokens of `kv`."""
    if tokens is None:
        return
    if tokens.counts.shape != kv.lengths.shape:
        raise ValueError(
            f"a token list for {list(kv.lengths.shape)} rows and heads must have counts of that "
            f"shape, got {list(tokens.counts.shape)}"
        )
    if tokens.indices.shape[2] == 0:
        return
    ends = (tokens.counts.long() - 1).clamp_min_(0)[..., None]
    first, last = tokens.indices[..., 0], tokens.indices.gather(-1, ends)[..., 0]
    wrong = (tokens.counts > 0) & ((first < 0) | (last >= kv.lengths))
    if wrong.any():
        raise ValueError(
            "a token list must name cached tokens; of a head with "
            f"{int(kv.lengths[wrong][0])} it names {int(first[wrong][0])} to {int(last[wrong][0])}"
        )
