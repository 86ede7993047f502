"""Statistics of attention by the compiled extension: C++ kernels for the CPU."""

from __future__ import annotations

from types import ModuleType

import torch

from tamis.cache.format import PagedKV
from tamis.platform import NATIVE_DTYPES


def chunk_scores(
    extension: ModuleType,
    q: torch.Tensor,
    kv: PagedKV,
    width: int,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None,
    softcap: float | None,
    isa: str | None = None,
) -> torch.Tensor:
    """`observe_reference.chunk_scores` for tensors on the CPU.

    `extension` is the compiled module; `isa` names the instruction set of the kernel, one of its
    `isas()`, None for the best. As in all functions here, the result does not depend on the number
    of threads, which is `torch.get_num_threads()`.
    """
    out = q.new_full((q.shape[1], q.shape[0], width), -torch.inf, dtype=torch.float32)
    _run(extension, isa, True, q, kv, None, out, scale, positions, window, softcap)
    return out


def column_sums(
    extension: ModuleType,
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor,
    width: int,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None,
    softcap: float | None,
    isa: str | None = None,
) -> torch.Tensor:
    """`observe_reference.column_sums` for tensors on the CPU; see `chunk_scores`."""
    out = q.new_zeros((q.shape[1], width), dtype=torch.float32)
    _run(extension, isa, True, q, kv, lse, out, scale, positions, window, softcap)
    return out


def decode_scores(
    extension: ModuleType,
    q: torch.Tensor,
    kv: PagedKV,
    width: int,
    *,
    scale: float,
    softcap: float | None,
    isa: str | None = None,
) -> torch.Tensor:
    """`observe_reference.decode_scores` of all cached tokens, on the CPU; see `chunk_scores`."""
    out = q.new_full((*q.shape[:2], width), -torch.inf, dtype=torch.float32)
    _run(extension, isa, False, q, kv, None, out, scale, None, None, softcap)
    return out


def decode_weights(
    extension: ModuleType,
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor,
    width: int,
    *,
    scale: float,
    positions: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    isa: str | None = None,
) -> torch.Tensor:
    """`observe_reference.decode_weights` for tensors on the CPU; see `chunk_scores`."""
    out = q.new_zeros((*q.shape[:2], width), dtype=torch.float32)
    _run(extension, isa, False, q, kv, lse, out, scale, positions, window, softcap)
    return out


def softmax_tokens(
    extension: ModuleType,
    scores: torch.Tensor,
    lengths: torch.Tensor,
    *,
    divisors: torch.Tensor | None,
    first: int,
    last: int,
    isa: str | None = None,
) -> torch.Tensor:
    """`observe_reference.softmax_tokens`, in place, on the CPU; see `chunk_scores`."""
    # Named here so that a converted copy lives until the kernel has read it.
    divisors = divisors.float().contiguous() if divisors is not None else None
    n, q_heads, width = scores.shape
    extension.softmax_tokens(
        isa=isa or "",
        threads=torch.get_num_threads(),
        n=n,
        q_heads=q_heads,
        kv_heads=lengths.shape[1],
        width=width,
        scores=scores.data_ptr(),
        lengths=lengths.data_ptr(),
        lengths_row_stride=lengths.stride(0),
        lengths_head_stride=lengths.stride(1),
        first=first,
        last=last,
        divisors=divisors.data_ptr() if divisors is not None else 0,
    )
    return scores


def top_pages(
    extension: ModuleType,
    q: torch.Tensor,
    kv: PagedKV,
    count: int,
    *,
    low: str,
    high: str,
    before: PagedKV | None,
    isa: str | None = None,
) -> torch.Tensor:
    """`observe_reference.top_pages` for tensors on the CPU; see `chunk_scores`."""
    q = q if q.stride(2) == 1 else q.contiguous()
    n, kv_heads = kv.lengths.shape
    out = kv.lengths.new_empty((n, kv_heads, count), dtype=torch.int64)
    # By position: names cost as much as a layer's pages.
    extension.top_pages(
        isa or "",
        torch.get_num_threads(),
        NATIVE_DTYPES[q.dtype],
        n,
        q.shape[1],
        kv_heads,
        q.shape[2],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        _bounded(before, low, high),
        _bounded(kv, low, high),
        count,
        out.data_ptr(),
    )
    return out


def top_tokens(
    extension: ModuleType,
    values: torch.Tensor,
    lengths: torch.Tensor,
    count: int,
    first: int,
    last: int,
) -> torch.Tensor:
    """`observe_reference.top_tokens` for tensors on the CPU; see `chunk_scores`."""
    values = values if values.stride(1) == 1 else values.contiguous()
    lengths = lengths.contiguous()
    out = lengths.new_empty((len(lengths), count))
    extension.top_tokens(
        threads=torch.get_num_threads(),
        rows=len(lengths),
        width=values.shape[1],
        row_stride=values.stride(0),
        values=values.data_ptr(),
        lengths=lengths.data_ptr(),
        first=first,
        last=last,
        count=count,
        out=out.data_ptr(),
    )
    return out


def _bounded(pages: PagedKV | None, low: str, high: str) -> tuple[int, ...]:
    """Pages as the extension's `top_pages` takes them (`bounded_pages` in module.cpp)."""
    if pages is None:
        return ()
    format, tables, lengths = pages.format, pages.tables, pages.lengths
    return (
        pages.data.data_ptr(),
        format.page_size,
        format.offsets[low],
        format.offsets[high],
        tables.data_ptr(),
        tables.stride(0),
        tables.stride(1),
        lengths.data_ptr(),
        lengths.stride(0),
        lengths.stride(1),
    )


def _run(
    extension: ModuleType,
    isa: str | None,
    chunk: bool,
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """One call of the kernel in observe.h, which fills `out` where queries see tokens."""
    # Named here so that converted copies live until the kernel has read them.
    q = q if q.stride(2) == 1 else q.contiguous()
    lse = lse.float().contiguous() if lse is not None else None
    positions = positions.to(torch.int64).contiguous() if positions is not None else None
    extension.observe(
        isa=isa or "",
        threads=torch.get_num_threads(),
        chunk=chunk,
        dtype=NATIVE_DTYPES[q.dtype],
        n=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=kv.lengths.shape[1],
        k_dim=q.shape[2],
        q=q.data_ptr(),
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        data=kv.data.data_ptr(),
        page_size=kv.format.page_size,
        k_offset=kv.format.offsets["k"],
        position_offset=kv.format.offsets["position"],
        tables=kv.tables.data_ptr(),
        tables_row_stride=kv.tables.stride(0),
        tables_head_stride=kv.tables.stride(1),
        lengths=kv.lengths.data_ptr(),
        lengths_row_stride=kv.lengths.stride(0),
        lengths_head_stride=kv.lengths.stride(1),
        positions=positions.data_ptr() if positions is not None else 0,
        window=window or 0,
        scale=scale,
        softcap=softcap or 0.0,
        lse=lse.data_ptr() if lse is not None else 0,
        out=out.data_ptr(),
        width=out.shape[-1],
    )
