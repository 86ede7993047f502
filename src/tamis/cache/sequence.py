"""One sequence's part of the cache: a page table, a length and positions for every KV head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tamis.cache.compaction import plan_compaction, ragged_arange
from tamis.cache.pool import IntArray, PageError

if TYPE_CHECKING:
    from tamis.cache.paged import PagedCache

_NEVER = 1 << 62


class OutOfSwap(Exception):  # noqa: N818 - an event for the scheduler, not a failure
    """The host memory for swapped sequences is full; nothing was changed."""


class SequenceCache:
    """The cached tokens of one sequence, one row per KV head per layer.

    Rows may differ in length once tokens are evicted or fall out of a window. A step goes:
    `reserve(n)` makes room, the attention callback writes the new tokens (BatchView.append),
    `advance(n)` counts them, `trim()` drops what no window reaches any more. Operations that can
    run out of room change nothing when they do.

    Attributes:
        tables: page ids, int32 [rows, capacity]; see `page_counts` for how many are meant.
        page_counts: pages held per row, int32 [rows], those reserved ahead included.
        lengths: cached tokens per row, int32 [rows].
        width: the most pages that any row holds.
        next_position: absolute position of the next token; not the length once tokens are gone.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.layout = cache.layout
        n_rows = self.layout.n_rows
        self.tables: IntArray = np.zeros((n_rows, 0), dtype=np.int32)
        self.page_counts: IntArray = np.zeros(n_rows, dtype=np.int32)
        self.lengths: IntArray = np.zeros(n_rows, dtype=np.int32)
        self.width = 0
        self.next_position = 0
        self._room = 0  # tokens that may be appended to every row without another look
        self._until_trim = 0  # tokens that may be appended before a window drops a page
        self._check_tails = False  # a partly filled last page may be shared
        self._swapped: list[torch.Tensor] | None = None
        self._freed = False
        self._settle()

    @property
    def swapped(self) -> bool:
        """Whether the pages lie in host memory."""
        return self._swapped is not None

    @property
    def room(self) -> int:
        """Tokens that are reserved and not yet used: at most so many may be appended."""
        return self._room

    @property
    def bytes(self) -> int:
        """Bytes of the pages held, shared and reserved ones included, here or in host memory."""
        return self._held_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cached tokens' keys and values alone."""
        return int(np.dot(self.lengths.astype(np.int64), self.layout.kv_bytes_per_row))

    def pages_needed(self, n: int) -> IntArray:
        """Pages of each format that `reserve(n)` would take, int32 [formats]."""
        self._require_resident()
        extra, shared = self._missing(n)
        np.add.at(extra, shared, 1)
        return self.layout.count(extra)

    def reserve(self, n: int) -> None:
        """Make room for `n` more tokens in every row.

        A partly filled last page that is shared with a fork is copied first, so that writing
        the new tokens leaves the other branch as it is.

        Raises:
            OutOfPages: too few pages are free; nothing was changed.
        """
        if n <= self._room:
            return
        self._require_resident()
        extra, shared = self._missing(n)
        rows = self._rows(extra)
        formats = self.layout.row_formats
        ids = self.cache.allocate(formats[np.concatenate([rows, shared])])
        self._widen(int((self.page_counts + extra).max()))
        self.tables[rows, self.page_counts[rows] + ragged_arange(extra)] = ids[: rows.size]
        self.page_counts += extra
        if shared.size:
            tails = self.lengths[shared] // self.layout.page_size
            old = self.tables[shared, tails]
            new = ids[rows.size :]
            self.cache.copy(old, new, formats[shared])
            self.cache.release(old, formats[shared])
            self.tables[shared, tails] = new
        self._check_tails = False
        self._settle()

    def advance(self, n: int) -> None:
        """Count `n` tokens that were appended to every row.

        Raises:
            PageError: fewer than `n` tokens were reserved.
        """
        if n > self._room:
            raise PageError(f"{n} tokens appended, {self._room} reserved")
        self.lengths += n
        self.next_position += n
        self._room -= n
        self._until_trim -= n

    def trim(self) -> None:
        """Free the leading pages of rows with a window that no later query can see.

        The next query, at `next_position`, sees positions after next_position - window. Token
        `i` of a row has at most the position next_position - length + i, so that tokens up to
        i = length - window can go, exactly where none was evicted and safely where some were.
        """
        if self._until_trim > 0 or self._freed or self.swapped:
            return
        rows = self.layout.window_rows
        drop = np.maximum(self.lengths[rows] - self.layout.windows + 1, 0) // self.layout.page_size
        rows, drop = rows[drop > 0], drop[drop > 0]
        width = int(self.page_counts[rows].max())
        old = self.tables[rows, :width]
        columns = np.arange(width, dtype=np.int32)
        gone_row, gone_column = np.nonzero(columns < drop[:, None])
        self.cache.release(old[gone_row, gone_column], self.layout.row_formats[rows[gone_row]])
        left = np.minimum(columns + drop[:, None], width - 1)
        self.tables[rows, :width] = np.take_along_axis(old, left, axis=1)
        self.page_counts[rows] -= drop
        self.lengths[rows] -= drop * self.layout.page_size
        self._settle()

    def keep(self, layer: int, indices: Sequence[IntArray]) -> None:
        """Keep some tokens of each KV head of a layer, and free the pages that this leaves empty.

        The kept tokens move to the front with all their fields, positions included. Pages shared
        with a fork are not written: their tokens move to new pages.

        Args:
            layer: the layer.
            indices: per KV head the tokens to keep, ascending indices within 0 .. length - 1,
                integers [kept]; heads may keep different numbers of tokens, or none.

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: indices that do not ascend or lie outside; nothing was changed.
        """
        self._require_resident()
        layer_rows = self.layout.rows(layer)
        page_size = self.layout.page_size
        plan = plan_compaction(self.lengths[layer_rows], indices, page_size)
        pages_kept = -(-plan.lengths // page_size)
        written = pages_kept - plan.first_page
        heads = np.arange(written.size, dtype=np.int32)
        row = np.repeat(heads, written) + np.int32(layer_rows.start)
        column = np.repeat(plan.first_page, written) + ragged_arange(written)
        formats = self.layout.row_formats
        shared = self.cache.shared(self.tables[row, column], formats[row])
        new = self.cache.allocate(formats[row[shared]])

        old_tables = self.tables[layer_rows, : self.width].copy()
        self.tables[row[shared], column[shared]] = new
        self.cache.pools[self.layout.layer_formats[layer]].move_tokens(
            (old_tables[plan.head, plan.source // page_size], plan.source % page_size),
            (
                self.tables[plan.head + layer_rows.start, plan.target // page_size],
                plan.target % page_size,
            ),
        )
        # What this row no longer refers to: the shared pages it replaced, and the pages left over.
        surplus = self.page_counts[layer_rows] - pages_kept
        surplus_head = np.repeat(heads, surplus)
        surplus_column = np.repeat(pages_kept, surplus) + ragged_arange(surplus)
        head = np.concatenate([row[shared] - layer_rows.start, surplus_head])
        gone = old_tables[head, np.concatenate([column[shared], surplus_column])]
        self.cache.release(gone, formats[head + layer_rows.start])
        self.page_counts[layer_rows] = pages_kept
        self.lengths[layer_rows] = plan.lengths
        self._check_tails = True
        self._settle()

    def fork(self) -> SequenceCache:
        """A second sequence with the same contents, sharing all pages that hold tokens.

        Either branch copies a shared page before it writes to it.
        """
        self._require_resident()
        other = SequenceCache(self.cache)
        other.page_counts = -(-self.lengths // self.layout.page_size)
        other.tables = self.tables[:, : int(other.page_counts.max())].copy()
        other.lengths = self.lengths.copy()
        other.next_position = self.next_position
        self.cache.retain(*other._pages(other.page_counts))
        for branch in (self, other):
            branch._check_tails = True
            branch._settle()
        return other

    def swap_out(self) -> None:
        """Copy the pages to host memory and free them on the device. Sharing is given up.

        Raises:
            OutOfSwap: the cache's `swap_bytes` do not hold them; nothing was changed.
        """
        self._require_resident()
        cache = self.cache
        used = -(-self.lengths // self.layout.page_size)
        ids, formats = self._pages(used)
        n_bytes = self._bytes(used)
        if cache.swap_bytes_in_use + n_bytes > cache.swap_bytes:
            free = cache.swap_bytes - cache.swap_bytes_in_use
            raise OutOfSwap(f"{n_bytes} bytes to swap out, {free} bytes of host memory free")
        self._swapped = cache.read(ids, formats)
        cache.swap_bytes_in_use += n_bytes
        cache.release(*self._pages(self.page_counts))
        self.page_counts = used
        self._held_bytes = n_bytes
        self._room = 0

    def swap_in(self) -> None:
        """Bring swapped pages back to the device.

        Raises:
            OutOfPages: too few pages are free; nothing was changed.
        """
        if self._swapped is None:
            raise PageError("swap_in of a sequence that is not swapped out")
        rows = self._rows(self.page_counts)
        formats = self.layout.row_formats[rows]
        ids = self.cache.allocate(formats)
        self.cache.write(ids, formats, self._swapped)
        self.tables[rows, ragged_arange(self.page_counts)] = ids
        self.cache.swap_bytes_in_use -= self.bytes
        self._swapped = None
        self._check_tails = False
        self._settle()

    def free(self) -> None:
        """Give everything back, on the device or in host memory; again does nothing."""
        if self._freed:
            return
        if self.swapped:
            self.cache.swap_bytes_in_use -= self.bytes
            self._swapped = None
        else:
            self.cache.release(*self._pages(self.page_counts))
        self._freed = True
        self._held_bytes = 0
        self.page_counts[:] = 0
        self.lengths[:] = 0
        self._room = 0

    def held_pages(self) -> tuple[IntArray, IntArray]:
        """Ids of the pages held on the device and their formats, int32 [pages] each."""
        return self._pages(np.zeros_like(self.page_counts) if self.swapped else self.page_counts)

    def contents(self, layer: int, head: int, field: str) -> torch.Tensor:
        """A copy of one field of a head's cached tokens, [length, width], on the device."""
        self._require_resident()
        row = self.layout.rows(layer).start + head
        pool = self.cache.pools[self.layout.layer_formats[layer]]
        length = int(self.lengths[row])
        ids = self.tables[row, : pool.format.pages_for(length)]
        return pool.tokens(ids, field)[:length]

    def positions(self, layer: int, head: int) -> IntArray:
        """Absolute positions of a head's cached tokens, ascending, int32 [length]."""
        positions: IntArray = self.contents(layer, head, "position")[:, 0].cpu().numpy()
        return positions

    def _missing(self, n: int) -> tuple[IntArray, IntArray]:
        """What room for `n` more tokens takes: new pages per row, int32 [rows], and the rows
        whose last page is partly filled and shared, int32 [m]."""
        page_size = self.layout.page_size
        wanted = -(-(self.lengths + n) // page_size)
        extra = np.maximum(wanted - self.page_counts, 0)
        rows = np.zeros(0, dtype=np.int32)
        if self._check_tails and n > 0:
            rows = np.flatnonzero(self.lengths % page_size).astype(np.int32)
            tails = self.tables[rows, self.lengths[rows] // page_size]
            rows = rows[self.cache.shared(tails, self.layout.row_formats[rows])]
        return extra, rows

    def _settle(self) -> None:
        """Work out the numbers that spare most steps a look at the tables."""
        page_size = self.layout.page_size
        self.width = int(self.page_counts.max())
        self._held_bytes = self._bytes(self.page_counts)
        room = int((self.page_counts * page_size - self.lengths).min())
        self._room = 0 if self._check_tails else room
        rows = self.layout.window_rows
        if rows.size:
            shortest = (self.layout.windows - 1 + page_size - self.lengths[rows]).min()
            self._until_trim = int(shortest)
        else:
            self._until_trim = _NEVER

    def _widen(self, n_pages: int) -> None:
        """Give the tables columns for at least `n_pages` pages per row."""
        n_rows, capacity = self.tables.shape
        if n_pages > capacity:
            tables = np.zeros((n_rows, max(n_pages, 2 * capacity)), dtype=np.int32)
            tables[:, :capacity] = self.tables
            self.tables = tables

    def _rows(self, counts: IntArray) -> IntArray:
        """Each row's number, once per page of it: int32 [sum of counts]."""
        return np.repeat(np.arange(counts.size, dtype=np.int32), counts)

    def _pages(self, counts: IntArray) -> tuple[IntArray, IntArray]:
        """The ids and formats of each row's first `counts` pages, int32 [sum of counts] each."""
        rows = self._rows(counts)
        return self.tables[rows, ragged_arange(counts)], self.layout.row_formats[rows]

    def _bytes(self, counts: IntArray) -> int:
        return self.layout.bytes_of(self.layout.count(counts))

    def _require_resident(self) -> None:
        if self._freed or self.swapped:
            state = "freed" if self._freed else "swapped out"
            raise PageError(f"the sequence is {state}")
