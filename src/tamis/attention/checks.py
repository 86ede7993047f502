"""What the public functions of this package demand of their arguments."""

from __future__ import annotations

from functools import lru_cache

import torch

from tamis.attention.encoding import (
    Encoding,
    PageEncoding,
    Plain,
    Pruned,
    Quantized,
    packed_bytes,
)
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.cache.format import PagedKV, PageFormat

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
    check_tables(q, kv, k.width)


def check_encoded(
    q: torch.Tensor, kv: PagedKV, encoding: PageEncoding, softcap: float | None
) -> None:
    """Raise ValueError unless queries `q` [n, q_heads, k_dim] can read encoded pages `kv`."""
    k_dim, k_dtype = check_encoding(kv.format, encoding)
    if q.dtype not in DTYPES or (k_dtype is not None and q.dtype != k_dtype):
        raise ValueError(f"q must be {k_dtype or 'of floating point'}, like k, got {q.dtype}")
    check_tables(q, kv, k_dim)
    if q.shape[0] != kv.lengths.shape[0]:
        raise ValueError(f"{q.shape[0]} queries cannot read {kv.lengths.shape[0]} rows of pages")
    check_options(q, None, None, softcap, None)


@lru_cache(maxsize=256)
def check_encoding(format: PageFormat, encoding: PageEncoding) -> tuple[int, torch.dtype | None]:
    """Raise ValueError unless pages of `format` can be encoded so.

    Returns:
        Channels of a key, and the dtype of keys that are stored as elements, None for codes.
    """
    fields = {field.name: field for field in format.fields}
    if missing := [name for name in encoding.fields if name not in fields]:
        raise ValueError(f"pages with the fields {[*fields]} lack {missing}")
    if isinstance(encoding.v.rows, Pruned):
        raise ValueError("channels of values cannot be pruned, only those of keys")
    dims = [_check_side(format, name, getattr(encoding, name)) for name in ("k", "v")]
    stored = {Plain: "k", Pruned: "k_kept"}.get(type(encoding.k.rows))
    return dims[0], fields[stored].dtype if stored is not None else None


def _check_side(format: PageFormat, name: str, encoding: Encoding) -> int:
    """Raise ValueError unless the fields of the keys or values fit together; returns channels."""
    rows, field = encoding.rows, format.field
    if isinstance(rows, Quantized):
        scale, zero, codes = (field(f"{name}_{what}") for what in ("scale", "zero", "codes"))
        by_token = rows.along == "channels"
        dim = scale.width * (rows.group if by_token else 1)
        most = format.page_size // (1 if by_token else rows.group)
        if not 1 <= rows.bits <= 8 or format.page_size % (1 if by_token else rows.group):
            raise ValueError(f"pages of {format.page_size} tokens cannot hold {rows}")
        wanted = packed_bytes(dim, rows.bits)
        if codes.width * codes.dtype.itemsize != wanted or codes.rows is not None:
            raise ValueError(f"{codes.name} must have {wanted} bytes per token, got {codes}")
        if {scale.rows_in(format.page_size), zero.rows_in(format.page_size)} != {most}:
            raise ValueError(f"{scale.name} and {zero.name} must have {most} rows per page")
        floats = [scale, zero]
    elif isinstance(rows, Pruned):
        dim, floats = field(f"{name}_mask").width, [field(f"{name}_kept")]
    else:
        dim, floats = field(name).width, [field(name)]
    if encoding.low_rank:
        floats += [field(f"{name}_left"), field(f"{name}_right")]
    if encoding.outliers:
        floats.append(field(f"{name}_outliers"))
    if len({f.dtype for f in floats}) > 1 or floats[0].dtype not in DTYPES:
        raise ValueError(
            f"{', '.join(f.name for f in floats)} must share one dtype of float32, float16, "
            f"bfloat16, got {', '.join(str(f.dtype) for f in floats)}"
        )
    return dim


def check_tables(q: torch.Tensor, kv: PagedKV, k_dim: int) -> None:
    """Raise ValueError unless queries with `k_dim` channels fit the page tables."""
    lengths, tables = kv.lengths, kv.tables
    if q.dim() != 3 or q.shape[2] != k_dim:
        raise ValueError(f"q must be [tokens, q_heads, {k_dim}], got {list(q.shape)}")
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
