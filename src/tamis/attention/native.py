"""Attention by the compiled extension: C++ kernels for the CPU, which release the GIL."""

from __future__ import annotations

from types import ModuleType

import torch

from tamis.attention.pattern import SparsePattern, TokenList
from tamis.cache.format import PagedKV
from tamis.platform import NATIVE_DTYPES


def decode(
    extension: ModuleType,
    q: torch.Tensor,
    kv: PagedKV,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tokens: TokenList | None = None,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tamis.attention.decode`, whose docstring holds, for tensors on the CPU.

    `extension` is the compiled module; `isa` names the instruction set of the kernel, one of its
    `isas()`, None for the best. The result does not depend on the number of threads, which is
    `torch.get_num_threads()`.
    """
    n, q_heads, k_dim = q.shape
    format, tables, lengths = kv.format, kv.tables, kv.lengths
    v_dim = format.field("v").width
    out = q.new_empty(n, q_heads, v_dim)
    lse = q.new_empty(n, q_heads, dtype=torch.float32)
    # Named here so that converted copies live until the kernel has read them.
    q = q if q.stride(2) == 1 else q.contiguous()
    if positions is not None:
        positions = positions.to(torch.int64).contiguous() if window is not None else None
    sinks = sinks.float().contiguous() if sinks is not None else None
    listed = {"tokens": 0, "tokens_row_stride": 0, "tokens_head_stride": 0, "counts": 0}
    if tokens is not None:
        indices = tokens.indices if tokens.indices.stride(2) == 1 else tokens.indices.contiguous()
        counts = tokens.counts.contiguous()
        listed = {
            "tokens": indices.data_ptr(),
            "tokens_row_stride": indices.stride(0),
            "tokens_head_stride": indices.stride(1),
            "counts": counts.data_ptr(),
        }
    extension.decode(
        isa=isa or "",
        threads=torch.get_num_threads(),
        dtype=NATIVE_DTYPES[q.dtype],
        n=n,
        q_heads=q_heads,
        kv_heads=lengths.shape[1],
        k_dim=k_dim,
        v_dim=v_dim,
        q=q.data_ptr(),
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        data=kv.data.data_ptr(),
        page_size=format.page_size,
        k_offset=format.offsets["k"],
        v_offset=format.offsets["v"],
        position_offset=format.offsets["position"],
        tables=tables.data_ptr(),
        tables_row_stride=tables.stride(0),
        tables_head_stride=tables.stride(1),
        lengths=lengths.data_ptr(),
        lengths_row_stride=lengths.stride(0),
        lengths_head_stride=lengths.stride(1),
        positions=positions.data_ptr() if positions is not None else 0,
        window=window or 0,
        scale=scale,
        softcap=softcap or 0.0,
        sinks=sinks.data_ptr() if sinks is not None else 0,
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        **listed,
    )
    return out, lse


def prefill(
    extension: ModuleType,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: PagedKV | None,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    pattern: SparsePattern | None = None,
    own: bool = True,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tamis.attention.prefill`, whose docstring holds, for tensors on the CPU.

    `extension` and `isa` as in `decode`. The result depends neither on the number of threads nor
    on how queries are tiled.
    """
    tokens, q_heads, k_dim = q.shape
    kv_heads, v_dim = v.shape[1:]
    out = q.new_empty(tokens, q_heads, v_dim)
    lse = q.new_empty(tokens, q_heads, dtype=torch.float32)
    # Named here so that converted copies live until the kernel has read them.
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    positions = positions.to(torch.int64).contiguous()
    sinks = sinks.float().contiguous() if sinks is not None else None
    pages = {"data": 0, "page_size": 1, "k_offset": 0, "v_offset": 0, "position_offset": 0}
    pages |= {"tables": 0, "tables_head_stride": 0, "lengths": 0, "lengths_head_stride": 0}
    if past is not None:
        pages = {
            "data": past.data.data_ptr(),
            "page_size": past.format.page_size,
            "k_offset": past.format.offsets["k"],
            "v_offset": past.format.offsets["v"],
            "position_offset": past.format.offsets["position"],
            "tables": past.tables.data_ptr(),
            "tables_head_stride": past.tables.stride(1),
            "lengths": past.lengths.data_ptr(),
            "lengths_head_stride": past.lengths.stride(1),
        }
    fields = _pattern_fields(pattern)
    extension.prefill(
        isa=isa or "",
        threads=torch.get_num_threads(),
        dtype=NATIVE_DTYPES[q.dtype],
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        q=q.data_ptr(),
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        k=k.data_ptr(),
        k_token_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v=v.data_ptr(),
        v_token_stride=v.stride(0),
        v_head_stride=v.stride(1),
        positions=positions.data_ptr(),
        window=window or 0,
        own=own,
        scale=scale,
        softcap=softcap or 0.0,
        sinks=sinks.data_ptr() if sinks is not None else 0,
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        pattern_block=pattern.block if pattern is not None else 0,
        pattern_q_blocks=pattern.q_blocks if pattern is not None else 0,
        **{f"pattern_{name}": 0 if x is None else x.data_ptr() for name, x in fields.items()},
        **pages,
    )
    return out, lse


def _pattern_fields(pattern: SparsePattern | None) -> dict[str, torch.Tensor | None]:
    """A pattern's tensors by name, contiguous; None for those that it lacks."""
    names = ("block_starts", "blocks", "column_starts", "columns", "window", "full")
    tensors = {name: getattr(pattern, name, None) for name in names}
    return {name: x.contiguous() if x is not None else None for name, x in tensors.items()}
