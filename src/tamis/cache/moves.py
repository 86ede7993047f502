"""Moves of tokens between tensors and pages."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from tamis.cache.format import PageFormat
from tamis.platform import native_for, triton_for

Indices = npt.NDArray[np.int32]


def append(
    data: torch.Tensor,
    format: PageFormat,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write a step's new keys, values and positions of several sequences at one layer.

    New token `t` of row `i` becomes cached token `lengths[i, h] + t` of every head `h`, on a page
    that `tables` must already name. Lengths, tables and other fields of the pages stay as they are.
    Tokens from starts[n] on are no row's, and are written nowhere.

    Args:
        data: the arena's bytes, uint8 [capacity].
        format: the layout of the pages.
        tables: page ids, int32 [n, kv_heads, max_pages], last dimension contiguous.
        lengths: tokens cached before, int32 [n, kv_heads].
        starts: row `i` adds the tokens starts[i]..starts[i + 1], int32 or int64 [n + 1].
        k: new keys in the format's dtype, [tokens, kv_heads, k_dim], last dimension contiguous.
        v: new values, [tokens, kv_heads, v_dim], like `k`.
        positions: absolute positions, int32 [tokens].
        backend: a name of `tamis.platform.BACKENDS`; None chooses.

    Raises:
        ValueError: shapes or dtypes do not fit together or do not fit the format.
        ConfigError: `backend` is unknown or cannot run here.
    """
    _check(format, tables, lengths, starts, k, v, positions)
    run = _reference
    if triton_for(backend, data, k):
        from tamis.cache.gpu import append as run  # takes seconds to import
    elif (extension := native_for(backend, data, k)) is not None:
        run = partial(_native, extension)
    run(data, format, tables, lengths, starts, k, v, positions)


def move_tokens(
    extension: ModuleType,
    data: torch.Tensor,
    format: PageFormat,
    source: tuple[Indices, Indices],
    target: tuple[Indices, Indices],
    at_once: bool,
) -> None:
    """`PagePool.move_tokens` by the compiled extension, for an arena on the CPU.

    Args:
        extension: the extension.
        data: the arena's bytes, uint8 [capacity].
        format: the layout of the pages.
        source: page ids and rows within the page, integers [n] each.
        target: the same, for where they go.
        at_once: whether all are read before any is written.

    Raises:
        IndexError: a page or row that there is not; nothing was moved.
    """
    arrays = [_contiguous(array) for array in (*source, *target)]
    if len({array.size for array in arrays}) != 1:
        raise IndexError(f"places of {[array.size for array in arrays]} tokens to move")
    extension.move_tokens(
        torch.get_num_threads(),
        data.data_ptr(),
        format.n_ids(data),
        format.page_size,
        arrays[0].size,
        *(array.ctypes.data for array in arrays),
        [(format.offsets[f.name], f.row_bytes) for f in format.fields if f.rows is None],
        at_once,
    )


def gather(
    extension: ModuleType, data: torch.Tensor, format: PageFormat, name: str, ids: Indices
) -> torch.Tensor:
    """A copy of one field of whole pages by the compiled extension, [*ids.shape, rows, width].

    Args:
        extension: the extension.
        data: the arena's bytes, uint8 [capacity], on the CPU.
        format: the layout of the pages.
        name: the field.
        ids: the pages, integers of any shape.

    Raises:
        IndexError: an id lies beyond the arena.
    """
    field, ids = format.field(name), _contiguous(ids)
    shape = (*ids.shape, field.rows_in(format.page_size), field.width)
    out = torch.empty(shape, dtype=field.dtype)
    _copy(extension, data, format, name, ids, out, out_of_pages=True)
    return out


def scatter(
    extension: ModuleType,
    data: torch.Tensor,
    format: PageFormat,
    name: str,
    ids: Indices,
    values: torch.Tensor,
) -> None:
    """Overwrite one field of whole pages by the compiled extension.

    Args:
        extension: the extension.
        data: the arena's bytes, uint8 [capacity], on the CPU.
        format: the layout of the pages.
        name: the field.
        ids: the pages, each once, integers [n].
        values: [n, rows, width] of the field's dtype.

    Raises:
        IndexError: an id lies beyond the arena; nothing was written.
        ValueError: `values` does not fit the field.
    """
    field, ids = format.field(name), _contiguous(ids)
    shape = (*ids.shape, field.rows_in(format.page_size), field.width)
    if values.shape != shape or values.dtype != field.dtype:
        raise ValueError(
            f"{name} must be {field.dtype} {list(shape)}, got {values.dtype} {list(values.shape)}"
        )
    values = values.detach().to(data.device).contiguous()
    _copy(extension, data, format, name, ids, values, out_of_pages=False)


def copy_pages(
    extension: ModuleType,
    format: PageFormat,
    source: tuple[torch.Tensor, Indices],
    target: tuple[torch.Tensor, Indices],
) -> None:
    """Copy whole pages by the compiled extension.

    Args:
        extension: the extension.
        format: the layout of the pages.
        source: the bytes of an arena on the CPU, uint8 [capacity], and page ids, integers [n].
        target: the same, for where they go: each page once, and none of them a source.

    Raises:
        IndexError: an id lies beyond its arena; nothing was copied.
    """
    ids = [_contiguous(part[1]) for part in (source, target)]
    if ids[0].size != ids[1].size:
        raise IndexError(f"{ids[0].size} pages to be copied to {ids[1].size}")
    (source_data, _), (target_data, _) = source, target
    extension.copy_runs(
        torch.get_num_threads(),
        ids[0].size,
        format.page_bytes,
        source_data.data_ptr(),
        ids[0].ctypes.data,
        format.n_ids(source_data),
        target_data.data_ptr(),
        ids[1].ctypes.data,
        format.n_ids(target_data),
    )


def _copy(
    extension: ModuleType,
    data: torch.Tensor,
    format: PageFormat,
    name: str,
    ids: Indices,
    values: torch.Tensor,
    *,
    out_of_pages: bool,
) -> None:
    """Copy a field of pages to contiguous `values`, or the other way."""
    run = format.field(name).row_bytes * format.field(name).rows_in(format.page_size)
    pages = data.data_ptr() + format.offsets[name], ids.ctypes.data, format.n_ids(data)
    tensor = values.data_ptr(), 0, 0
    ends = (*pages, *tensor) if out_of_pages else (*tensor, *pages)
    extension.copy_runs(torch.get_num_threads(), ids.size, run, *ends)


def _contiguous(array: Indices) -> Indices:
    """The same numbers as contiguous int32."""
    return np.ascontiguousarray(array, dtype=np.int32)


def _reference(
    data: torch.Tensor,
    format: PageFormat,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """`append` in plain torch, on any device."""
    counts = starts.diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=k.device), counts)
    k, v, positions = (new[: len(row)] for new in (k, v, positions))
    within = torch.arange(len(row), device=k.device) - starts[:-1].long()[row]
    token = lengths[row].long() + within[:, None]  # [tokens, kv_heads]
    page = tables[row].gather(2, (token // format.page_size)[..., None])[..., 0].long()
    slot = token % format.page_size
    format.view(data, "k")[page, slot] = k
    format.view(data, "v")[page, slot] = v
    format.view(data, "position")[page, slot] = positions[:, None, None]


def _native(
    extension: ModuleType,
    data: torch.Tensor,
    format: PageFormat,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """`append` by the compiled extension, for tensors on the CPU."""
    k, v = (new if new.stride(2) == 1 else new.contiguous() for new in (k, v))
    starts, positions = starts.to(torch.int64).contiguous(), positions.contiguous()
    item = k.element_size()
    extension.append(
        threads=torch.get_num_threads(),
        data=data.data_ptr(),
        page_size=format.page_size,
        tables=tables.data_ptr(),
        tables_row_stride=tables.stride(0),
        tables_head_stride=tables.stride(1),
        lengths=lengths.data_ptr(),
        lengths_row_stride=lengths.stride(0),
        lengths_head_stride=lengths.stride(1),
        starts=starts.data_ptr(),
        n=lengths.shape[0],
        kv_heads=lengths.shape[1],
        k=k.data_ptr(),
        k_token_stride=k.stride(0) * item,
        k_head_stride=k.stride(1) * item,
        k_row_bytes=k.shape[2] * item,
        k_offset=format.offsets["k"],
        v=v.data_ptr(),
        v_token_stride=v.stride(0) * item,
        v_head_stride=v.stride(1) * item,
        v_row_bytes=v.shape[2] * item,
        v_offset=format.offsets["v"],
        positions=positions.data_ptr(),
        position_offset=format.offsets["position"],
    )


def _check(
    format: PageFormat,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Raise ValueError unless the arguments of `append` fit together."""
    n, kv_heads = lengths.shape
    tokens = len(positions)
    for name, new in (("k", k), ("v", v)):
        field = format.field(name)
        if new.shape != (tokens, kv_heads, field.width) or new.dtype != field.dtype:
            raise ValueError(
                f"{name} must be {field.dtype} [{tokens}, {kv_heads}, {field.width}], "
                f"got {new.dtype} {list(new.shape)}"
            )
    if tables.dim() != 3 or tables.shape[:2] != (n, kv_heads) or len(starts) != n + 1:
        raise ValueError(
            f"tables must be [{n}, {kv_heads}, max_pages] and starts [{n + 1}], "
            f"got {list(tables.shape)} and {list(starts.shape)}"
        )
    for name, tensor in (("tables", tables), ("lengths", lengths), ("positions", positions)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be torch.int32, got {tensor.dtype}")
