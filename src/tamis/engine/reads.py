"""Fewer pages for a decode step: page tables cut down to a selection."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tamis.cache import PagedKV


def narrowed(pages: PagedKV, chosen: Tensor, before: Tensor) -> tuple[PagedKV, Tensor]:
    """The chosen ones of a layer's pages.

    Args:
        pages: the live pages, one row.
        chosen: page numbers per head, ascending, int64 [kv_heads, n]; numbers count the encoded
            pages first, and those that a head does not have are passed over. Where a head's last
            page is only partly filled, it must be among them or nothing after a gap is read of it.
        before: encoded pages of each head, int64 [kv_heads].

    Returns:
        The live pages among them, and `chosen` itself for the encoded ones.
    """
    size = pages.format.page_size
    lengths = pages.lengths[0].long()
    number = chosen - before[:, None]
    n_pages = -(-lengths // size)
    real = (number >= 0) & (number < n_pages[:, None])
    # Chosen pages to the front, in their order; what lies behind them is not read.
    order = (~real).int().sort(dim=1, stable=True).indices
    number = number.clamp(min=0).minimum((n_pages[:, None] - 1).clamp_min(0)).gather(1, order)
    count = real.sum(1)
    last = torch.where(count > 0, number.gather(1, (count - 1).clamp_min(0)[:, None])[:, 0], -1)
    missing = torch.where(last == n_pages - 1, n_pages * size - lengths, 0)
    read = (count * size - missing).clamp_min(0)
    tables = pages.tables[0].gather(1, number)
    return replace(pages, tables=tables[None], lengths=read[None].int()), chosen
