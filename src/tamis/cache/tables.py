"""Which pages a number of rows hold, and how many tokens lie in them."""

from __future__ import annotations

import numpy as np
import torch

from tamis.cache.format import PagedKV
from tamis.cache.pool import IntArray, PagePool, ragged_arange
from tamis.cache.tier import Tier


class PageTables:
    """A page table and a length per row; a row is one KV head of one layer.

    Attributes:
        tier: where the pages lie.
        row_pools: number of each row's pool in the tier, int32 [rows].
        tables: page ids, int32 [rows, capacity]; see `page_counts` for how many are meant.
        page_counts: pages held per row, int32 [rows].
        lengths: tokens per row, int32 [rows].
    """

    def __init__(self, tier: Tier, row_pools: IntArray) -> None:
        self.tier = tier
        self.row_pools = row_pools
        self.tables: IntArray = np.zeros((row_pools.size, 0), dtype=np.int32)
        self.page_counts: IntArray = np.zeros(row_pools.size, dtype=np.int32)
        self.lengths: IntArray = np.zeros(row_pools.size, dtype=np.int32)

    def pool(self, rows: slice) -> PagePool:
        """The pool of the rows of one layer."""
        return self.tier.pools[int(self.row_pools[rows.start])]

    def used_pages(self, rows: slice) -> IntArray:
        """Pages that hold tokens, of the rows of one layer, int32 [kv_heads]."""
        used: IntArray = -(-self.lengths[rows] // self.pool(rows).format.page_size)
        return used

    def held(self, counts: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Ids and pools of each row's first `counts` pages (None: all), int32 [sum] each."""
        counts = self.page_counts if counts is None else counts
        rows = self._repeat_rows(counts)
        return self.tables[rows, ragged_arange(counts)], self.row_pools[rows]

    def read_pages(self, rows: slice, name: str, first: int, last: int) -> torch.Tensor:
        """A copy of one field of the pages first .. last - 1 of one layer's rows.

        Returns:
            `[kv_heads, last - first, rows, width]` where the pages lie, zero for pages in which a
            row has no token; `last` is at most the most pages that any of them uses.
        """
        missing = np.arange(first, last) >= self.used_pages(rows)[:, None]
        ids = np.where(missing, 0, self.tables[rows, first:last])
        values = self.pool(rows).gather(ids, name)
        if missing.any():
            values[torch.from_numpy(missing).to(values.device)] = 0
        return values

    def read_tokens(self, rows: slice, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy of one field of the tokens start .. stop - 1 of one layer's rows.

        Returns:
            `[kv_heads, stop - start, width]` where the pages lie, zero beyond each row's length;
            `stop` is at most the greatest length.
        """
        size = self.pool(rows).format.page_size
        first = start // size
        pages = self.read_pages(rows, name, first, -(-stop // size))
        values = pages.flatten(1, 2)[:, start - first * size : stop - first * size]
        missing = np.arange(start, stop) >= self.lengths[rows, None]
        if missing.any():
            values[torch.from_numpy(missing).to(values.device)] = 0
        return values

    def paged(self, rows: slice) -> PagedKV:
        """The pages of one layer's rows as attention kernels read them where they lie (n = 1)."""
        counts = self.page_counts[rows]
        held = np.arange(int(counts.max())) < counts[:, None]
        ids = np.where(held, self.tables[rows, : held.shape[1]], 0)
        pool = self.pool(rows)
        data = pool.arena.data
        tables, lengths = (torch.from_numpy(a[None]) for a in (ids, self.lengths[rows].copy()))
        return PagedKV(data, pool.format, tables.to(data.device), lengths.to(data.device))

    def share_into(self, other: PageTables, counts: IntArray) -> None:
        """Make `other`, which is empty, hold each row's first `counts` pages too."""
        other.page_counts = counts.copy()
        other.tables = self.tables[:, : int(counts.max())].copy()
        other.lengths = self.lengths.copy()
        self.tier.retain(*other.held())

    def release_all(self) -> None:
        """Give all pages back and forget all tokens."""
        self.tier.release(*self.held())
        self.page_counts[:] = 0
        self.lengths[:] = 0

    def hold(self, ids: IntArray) -> None:
        """Hold other pages in place of all those that there are, in the order of `held`, int32
        [sum of page_counts]; the caller sees to their references and those of the old ones."""
        rows = self._repeat_rows(self.page_counts)
        self.tables[rows, ragged_arange(self.page_counts)] = ids

    def _append_pages(self, rows: IntArray, counts: IntArray, ids: IntArray) -> None:
        """Add pages after those of the (distinct) rows: counts[i] of the `ids` to rows[i]."""
        self._widen(int((self.page_counts[rows] + counts).max(initial=0)))
        row = np.repeat(rows, counts)
        self.tables[row, self.page_counts[row] + ragged_arange(counts)] = ids
        self.page_counts[rows] += counts

    def _widen(self, n_pages: int) -> None:
        """Give the tables columns for at least `n_pages` pages per row."""
        n_rows, capacity = self.tables.shape
        if n_pages > capacity:
            tables = np.zeros((n_rows, max(n_pages, 2 * capacity)), dtype=np.int32)
            tables[:, :capacity] = self.tables
            self.tables = tables

    def _repeat_rows(self, counts: IntArray) -> IntArray:
        """Each row's number, once per page of it: int32 [sum of counts]."""
        return np.repeat(np.arange(counts.size, dtype=np.int32), counts)


def check_shape(name: str, values: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the values for a field have the shape that it needs."""
    if values.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")
