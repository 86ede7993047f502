"""Page tables cut down to some pages of each head, for a decode that reads no others."""

from __future__ import annotations

from types import ModuleType

import torch

from tamis.cache.format import PagedKV
from tamis.platform import native_for


def narrowed(
    kv: PagedKV,
    chosen: torch.Tensor,
    before: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> PagedKV:
    """The chosen ones of the pages of each head, in their order.

    Args:
        kv: the pages, n rows.
        chosen: page numbers, ascending, int64 [n, kv_heads, m]; those that a head does not have are
            passed over. Where a head's last page is only partly filled it must be the last of them
            or not among them, as ascending numbers say.
        before: what the numbers of each head's pages begin with, int64 [n, kv_heads]; None for 0.
        backend: "reference" or "native"; None chooses (see `tamis.platform.native_for`).

    Returns:
        The pages with tables [n, kv_heads, m], and lengths of the tokens that lie in them.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention.narrow import narrowed
        >>> from tamis.cache.format import PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> tables = torch.tensor([[[70, 80, 90]]], dtype=torch.int32)
        >>> kv = PagedKV(torch.zeros(0), format, tables, torch.full((1, 1), 9, dtype=torch.int32))
        >>> few = narrowed(kv, torch.tensor([[[0, 2, 5]]]))
        >>> few.tables[..., :2].tolist(), few.lengths.tolist()
        ([[[70, 90]]], [[5]])
    """
    n, kv_heads = kv.lengths.shape
    if chosen.dim() != 3 or chosen.shape[:2] != (n, kv_heads) or chosen.dtype != torch.int64:
        raise ValueError(
            f"chosen pages must be int64 [{n}, {kv_heads}, m], "
            f"got {chosen.dtype} {list(chosen.shape)}"
        )
    if before is not None and (before.shape, before.dtype) != ((n, kv_heads), torch.int64):
        raise ValueError(
            f"before must be int64 [{n}, {kv_heads}], got {before.dtype} {list(before.shape)}"
        )
    extension = native_for(backend, kv.tables, chosen)
    run = _reference if extension is None else _native
    tables, lengths = run(extension, kv, chosen, before)
    return PagedKV(kv.data, kv.format, tables, lengths)


def _reference(
    _: ModuleType | None, kv: PagedKV, chosen: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables and lengths of `narrowed`, in plain torch, on any device."""
    size, lengths = kv.format.page_size, kv.lengths.long()[..., None]
    number = chosen if before is None else chosen - before[..., None]
    real = (number >= 0) & (number * size < lengths)
    read = (lengths - number * size).clamp_max(size).masked_fill(~real, 0).sum(2)
    # Chosen pages to the front, in their order; what lies behind them is not read.
    order = (~real).int().sort(dim=2, stable=True).indices
    tables = kv.tables.gather(2, number.masked_fill(~real, 0).gather(2, order))
    return tables.masked_fill(~real.gather(2, order), 0), read.int()


def _native(
    extension: ModuleType | None,
    kv: PagedKV,
    chosen: torch.Tensor,
    before: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the compiled extension, for tensors on the CPU."""
    assert extension is not None
    chosen = chosen if chosen.stride(2) == 1 else chosen.contiguous()
    before = before.contiguous() if before is not None else None
    tables, lengths = kv.tables.new_empty(chosen.shape), kv.lengths.new_empty(kv.lengths.shape)
    # By position: names cost more than the work.
    extension.narrow(
        chosen.shape[0],
        chosen.shape[1],
        kv.format.page_size,
        kv.tables.data_ptr(),
        kv.tables.stride(0),
        kv.tables.stride(1),
        kv.lengths.data_ptr(),
        kv.lengths.stride(0),
        kv.lengths.stride(1),
        chosen.data_ptr(),
        chosen.stride(0),
        chosen.stride(1),
        chosen.shape[2],
        before.data_ptr() if before is not None else 0,
        tables.data_ptr(),
        lengths.data_ptr(),
    )
    return tables, lengths
