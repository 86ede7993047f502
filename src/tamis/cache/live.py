"""The live pages of a sequence: reading and writing the tokens that attention sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tamis.cache.format import PagedKV
from tamis.cache.layout import CacheLayout
from tamis.cache.order import TokenOrder
from tamis.cache.pool import IntArray, PageError, ragged_arange
from tamis.cache.tables import PageTables, check_shape
from tamis.cache.tier import Tier


class LivePages(PageTables):
    """Reads and writes of cached tokens and of what lies beside them.

    Tensors are padded to the layer's longest head: `max_len` is the greatest length of its heads
    and `max_pages` the pages of that head. What is read beyond a head's own length is zero; what
    is written there is ignored. Writes never reach another sequence: a page shared with a fork
    is copied first, which may raise OutOfPages with nothing changed (see `unshare`).

    Tokens are numbered by position, wherever they lie: `take_out` lets one go without moving the
    others. What reads or writes pages as a whole puts such rows in order first, which writes to
    them.

    Where `layers` is asked for, consecutive layers of one page format may be named as a range:
    their heads then follow one another, as if they were one layer's.

    Attributes:
        layout: the rows, with the columns of this sequence.
    """

    def __init__(self, tier: Tier, layout: CacheLayout, row_pools: IntArray) -> None:
        super().__init__(tier, row_pools)
        self.layout = layout
        self._may_share = np.zeros(layout.n_rows, dtype=np.bool_)  # rows with a shared page
        self._order = TokenOrder(layout.n_rows)
        self._absent: str | None = None  # why nothing lies on the device

    def pages(self, layer: int) -> PagedKV:
        """One layer's pages as attention kernels read them (n = 1), as they are now, in order."""
        rows = self._rows_of(layer)
        self._put_in_order(rows)
        return self.paged(rows)

    def unordered_pages(self, layers: range) -> PagedKV:
        """The pages of consecutive layers of one format and as many heads, one row per layer, with
        tokens where they lie: for reads that do not ask for their order."""
        rows = self._rows_of(layers)
        pages = self.paged(rows)
        shape = (len(layers), len(self.lengths[rows]) // len(layers))
        return replace(
            pages,
            tables=pages.tables.view(*shape, -1),
            lengths=pages.lengths.view(shape),
        )

    def read_tokens(self, rows: slice, name: str, start: int, stop: int) -> torch.Tensor:
        if not self._order.mixed[rows].any():
            return super().read_tokens(rows, name, start, stop)
        longest = int(self.lengths[rows].max())
        values = super().read_tokens(rows, name, 0, longest)
        slots = torch.from_numpy(self._order.slots(rows, longest)[:, start:stop].astype(np.int64))
        index = slots.to(values.device)[..., None].expand(-1, -1, values.shape[2])
        return values.gather(1, index)

    def lengths_of(self, layers: int | range) -> IntArray:
        """Cached tokens of every head, int32 [kv_heads]."""
        lengths: IntArray = self.lengths[self._rows_of(layers)].copy()
        return lengths

    def contents(self, layer: int, head: int, field: str) -> torch.Tensor:
        """A copy of one field of a head's cached tokens, [length, width], on the device."""
        row = self._rows_of(layer).start + head
        return self.read_tokens(slice(row, row + 1), field, 0, int(self.lengths[row]))[0]

    def positions(self, layer: int, head: int) -> IntArray:
        """Absolute positions of a head's cached tokens, ascending, int32 [length]."""
        positions: IntArray = self.contents(layer, head, "position")[:, 0].cpu().numpy()
        return positions

    def keys_values(
        self, layers: int | range, start: int = 0, stop: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the keys and values of the cached tokens start .. stop - 1 of every head.

        Returns:
            `[kv_heads, n, k_dim]` and `[kv_heads, n, v_dim]` in the cache's dtype; `n` is
            stop - start, less what lies beyond `max_len`.
        """
        rows = self._rows_of(layers)
        longest = int(self.lengths[rows].max())
        stop = longest if stop is None else min(stop, longest)
        start = min(start, stop)
        k, v = (self.read_tokens(rows, name, start, stop) for name in ("k", "v"))
        return k, v

    def positions_of(self, layers: int | range) -> torch.Tensor:
        """Absolute positions of every head's tokens, int32 [kv_heads, max_len], -1 beyond."""
        rows = self._rows_of(layers)
        positions = self.column(layers, "position")[..., 0]
        beyond = np.arange(positions.shape[1]) >= self.lengths[rows, None]
        return positions.masked_fill_(torch.from_numpy(beyond).to(positions.device), -1)

    def write(
        self,
        layers: int | range,
        indices: Sequence[IntArray],
        k: Sequence[torch.Tensor] | None = None,
        v: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Overwrite the keys, the values or both of some cached tokens.

        Args:
            layers: whose heads.
            indices: per KV head cached indices within 0 .. length - 1, each at most once,
                integers [m]; heads may differ in m.
            k: per KV head new keys [m, k_dim], converted to the cache's dtype; None leaves them.
            v: the same for values [m, v_dim].

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: indices outside the length, or shapes that do not fit; nothing was changed.
        """
        rows = self._rows_of(layers)
        lengths, pool = self.lengths[rows], self.pool(rows)
        if len(indices) != lengths.size:
            raise ValueError(f"write needs indices for {lengths.size} heads, got {len(indices)}")
        counts = np.array([len(head) for head in indices], dtype=np.int32)
        token = np.concatenate([np.asarray(head, dtype=np.int32) for head in indices])
        head = np.repeat(np.arange(counts.size, dtype=np.int32), counts)
        outside = head[(token < 0) | (token >= lengths[head])]
        if outside.size:
            raise ValueError(
                f"the indices to write of head {outside[0]} must lie within "
                f"0 .. {lengths[outside[0]] - 1}, got {np.asarray(indices[outside[0]])}"
            )
        written = {}
        for name, per_head in (("k", k), ("v", v)):
            if per_head is not None:
                field = pool.format.field(name)
                want = [(n, field.width) for n in counts.tolist()]
                if [tuple(values.shape) for values in per_head] != want:
                    got = [list(values.shape) for values in per_head]
                    raise ValueError(f"{name} must be per head [m, {field.width}], got {got}")
                written[name] = torch.cat(list(per_head)).to(field.dtype)
        slot = self._order.slots(rows, int(lengths.max()))[head, token]
        row, page = head + np.int32(rows.start), slot // pool.format.page_size
        self._own_each(row, page)
        ids = self.tables[row, page]
        for name, values in written.items():
            pool.scatter_rows(ids, slot % pool.format.page_size, name, values)

    def column(self, layers: int | range, name: str) -> torch.Tensor:
        """A copy of a field with a row per token, [kv_heads, max_len, width]."""
        rows = self._rows_of(layers)
        return self.read_tokens(rows, name, 0, int(self.lengths[rows].max()))

    def set_column(self, layer: int, name: str, values: torch.Tensor) -> None:
        """Overwrite a side column of every token.

        Args:
            layer: the layer.
            name: the column.
            values: [kv_heads, max_len, width], converted to the column's dtype.

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: `values` has another shape; nothing was changed.
        """
        rows = self._rows_of(layer)
        self._put_in_order(rows)
        format, lengths = self.pool(rows).format, self.lengths[rows]
        longest = int(lengths.max())
        check_shape(name, values, (lengths.size, longest, format.field(name).width))
        beyond = torch.from_numpy(np.arange(longest) >= lengths[:, None]).to(values.device)
        size, width = format.page_size, values.shape[2]
        n_pages = format.pages_for(longest)
        padded = values.new_zeros(lengths.size, n_pages * size, width)
        padded[:, :longest] = values.masked_fill(beyond[..., None], 0)
        self._write_pages(rows, name, 0, padded.view(lengths.size, n_pages, size, width))

    def accumulate(
        self, layers: int | range, name: str, values: torch.Tensor, decay: float = 1.0
    ) -> None:
        """Add to a side column of width 1.

        Args:
            layers: whose heads.
            name: the column.
            values: what each token's element grows by, [kv_heads, max_len], fp32, in the order in
                which the tokens lie, which attention over `unordered_pages` sees.
            decay: what the elements are multiplied by before.

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: `values` has another shape; nothing was changed.
        """
        rows = self._rows_of(layers)
        pool, used = self.pool(rows), self.used_pages(rows)
        lengths = self.lengths[rows]
        check_shape(name, values, (lengths.size, int(lengths.max())))
        head, page = np.nonzero(np.arange(int(used.max())) < used[:, None])
        row = (head + rows.start).astype(np.int32)
        self._own(row, page.astype(np.int32))
        ids, size = self.tables[row, page], pool.format.page_size
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size))
        if not (lengths == lengths[0]).all():
            beyond = np.arange(padded.shape[1]) >= lengths[:, None]
            padded = padded.masked_fill(torch.from_numpy(beyond).to(padded.device), 0)
            padded = padded.view(lengths.size, -1, size)[head, page]
        column = pool.gather(ids, name).view(-1, size, 1)
        pool.scatter(ids, name, column.mul_(decay).add_(padded.reshape(-1, size, 1)))

    def summaries(self, layer: int, name: str, first_page: int = 0) -> torch.Tensor:
        """A copy of a field with its own rows per page, from page `first_page` on.

        Returns:
            [kv_heads, max_pages - first_page, rows, width]; a partly filled page is among them.
        """
        rows = self._rows_of(layer)
        self._put_in_order(rows)
        return self.read_pages(rows, name, first_page, int(self.used_pages(rows).max()))

    def set_summaries(self, layer: int, name: str, first_page: int, values: torch.Tensor) -> None:
        """Overwrite a field with its own rows per page in the pages from `first_page` on.

        Args:
            layer: the layer.
            name: the field.
            first_page: the first page that is written.
            values: [kv_heads, pages, rows, width], converted to the field's dtype; `pages` is at
                most max_pages - first_page.

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: `values` has another shape; nothing was changed.
        """
        rows = self._rows_of(layer)
        self._put_in_order(rows)
        format, used = self.pool(rows).format, self.used_pages(rows)
        field = format.field(name)
        n_pages = min(values.shape[1], int(used.max()) - first_page)
        shape = (used.size, n_pages, field.rows_in(format.page_size), field.width)
        check_shape(name, values, shape)
        self._write_pages(rows, name, first_page, values)

    def unshare(self, layers: range | None = None) -> None:
        """Copy every page of these layers (None: all) that is shared with a fork.

        After it, writes to them cannot run out of pages until the next fork.

        Raises:
            OutOfPages: the copies do not fit; nothing was changed.
        """
        self._require_resident()
        span = self._span(layers)
        rows = np.flatnonzero(self._may_share[span]).astype(np.int32) + np.int32(span.start)
        used = -(-self.lengths[rows] // self.layout.page_size)
        self._own(np.repeat(rows, used), ragged_arange(used))
        self._may_share[rows] = False

    def _write_pages(self, rows: slice, name: str, first: int, values: torch.Tensor) -> None:
        """Overwrite one field in pages first.. of a layer's rows, where they hold tokens.

        `values` [kv_heads, pages, rows, width].
        """
        pool = self.pool(rows)
        held = np.arange(first, first + values.shape[1]) < self.used_pages(rows)[:, None]
        head, page = np.nonzero(held)
        row, column = (head + rows.start).astype(np.int32), (page + first).astype(np.int32)
        self._own(row, column)
        index = torch.from_numpy(held).to(values.device)
        elements = values[index].to(pool.format.field(name).dtype)
        pool.scatter(self.tables[row, column], name, elements)

    def _own_each(self, row: IntArray, column: IntArray) -> None:
        """`_own` for pages that may be given several times."""
        if self._may_share.any():
            pages = np.unique(np.stack([row, column]), axis=1)
            self._own(pages[0], pages[1])

    def _put_in_order(self, rows: slice | IntArray) -> None:
        """Move the tokens of these rows to where their numbers say.

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
        """
        if not self._order.mixed.any():
            return
        mixed = np.arange(self.layout.n_rows, dtype=np.int32)[rows]
        mixed = mixed[self._order.mixed[mixed]]
        size, used = self.layout.page_size, -(-self.lengths[mixed] // self.layout.page_size)
        self._own(np.repeat(mixed, used), ragged_arange(used))
        for row in mixed.tolist():
            length = int(self.lengths[row])
            source = self._order.slots(slice(row, row + 1), length)[0]
            target = np.flatnonzero(source != np.arange(length)).astype(np.int32)
            source = source[target]
            self.tier.move_tokens(
                (self.tables[row, source // size], source % size),
                (self.tables[row, target // size], target % size),
                np.full(target.size, self.row_pools[row]),
                at_once=True,
            )
        self._order.settle(mixed)

    def _own(self, row: IntArray, column: IntArray) -> None:
        """Replace those of the pages (each given once) that are shared by copies of their own.

        Raises:
            OutOfPages: the copies do not fit; nothing was changed.
        """
        if not self._may_share.any():
            return
        shared = self.tier.shared(self.tables[row, column], self.row_pools[row])
        row, column = row[shared], column[shared]
        self._replace(row, column, self.tier.allocate(self.row_pools[row]))

    def _replace(self, row: IntArray, column: IntArray, new: IntArray) -> None:
        """Copy pages to `new` ones, int32 [n], and hold these in their place."""
        old, pools = self.tables[row, column], self.row_pools[row]
        self.tier.copy(old, new, pools)
        self.tier.release(old, pools)
        self.tables[row, column] = new

    def _span(self, layers: range | None) -> slice:
        """The rows of a run of layers, None for all.

        Raises:
            ValueError: `layers` is not a run of consecutive layers of the model.
        """
        n = len(self.layout.layers)
        if layers is None:
            return slice(0, self.layout.n_rows)
        if len(layers) == 0 or layers.step != 1 or layers[0] < 0 or layers[-1] >= n:
            raise ValueError(f"layers must be consecutive within 0 .. {n - 1}, got {layers}")
        return slice(self.layout.rows(layers[0]).start, self.layout.rows(layers[-1]).stop)

    def _rows_of(self, layers: int | range) -> slice:
        """The rows of some layers, of a sequence that lies on the device."""
        self._require_resident()
        return self.layout.rows(layers) if isinstance(layers, int) else self._span(layers)

    def _require_resident(self) -> None:
        """Raise PageError unless the pages lie on the device."""
        if self._absent is not None:
            raise PageError(f"the sequence is {self._absent}")
