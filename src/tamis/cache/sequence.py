"""One sequence's part of the cache: the life of its live pages, and its stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from tamis.cache import moves
from tamis.cache.compaction import Compaction, plan_compaction, plan_retraction
from tamis.cache.format import Field, PagedKV, PageFormat
from tamis.cache.live import LivePages
from tamis.cache.pool import BoolArray, IntArray, PageError, ragged_arange
from tamis.cache.store import Store
from tamis.cache.tables import PageTables

if TYPE_CHECKING:
    from tamis.cache.paged import PagedCache

_NEVER = 1 << 62

_PIECE = 4096
"""Tokens of one layer that are copied from one sequence to another at once."""


@dataclass(frozen=True)
class SwappedPages:
    """Pages of a sequence that lie in host memory, each once however many rows hold it.

    Attributes:
        copies: where they lie there, int32 [m].
        pools: their pools, int32 [m].
        final: which of them are full or a store's, bool [m].
        place: which of them each table entry is, table after table and row after row, integers
            [entries].
    """

    copies: IntArray
    pools: IntArray
    final: BoolArray
    place: np.ndarray[tuple[int], np.dtype[np.intp]]


class SequenceCache(LivePages):
    """The cached tokens of one sequence, one row per KV head per layer, and its stores.

    Rows may differ in length once tokens are evicted or fall out of a window. A step goes:
    `reserve(n)` makes room, the attention callback writes the new tokens (BatchView.append),
    `advance(n)` counts them, `trim()` drops what no window reaches any more. Operations that can
    run out of room change nothing when they do. The side columns of a token that is appended are
    zero, and so are the summaries of a page that is begun.

    Attributes:
        cache: the cache it belongs to.
        stores: its stores by name.
        width: the most pages that any row holds.
        next_position: absolute position of the next token; not the length once tokens are gone.
            `advance` counts it on; whoever runs tokens at other positions may set it.
    """

    def __init__(self, cache: PagedCache, columns: tuple[Field, ...] = ()) -> None:
        """An empty sequence.

        Args:
            cache: where it lives.
            columns: fields that its pages hold after keys, values and positions.

        Raises:
            ConfigError: the columns' names clash, or a page with them does not fit the blocks of
                the cache's memory.
        """
        super().__init__(cache.device_tier, *cache.rows_with(columns))
        self.cache = cache
        self.stores: dict[str, Store] = {}
        self.width = 0
        self.next_position = 0
        self._column_names = tuple(field.name for field in columns)
        self._room = 0  # tokens that may be appended to every row without another look
        self._until_trim = 0  # tokens that may be appended before a window drops a page
        # Rows whose partly filled last page may be shared, or hold columns of tokens now gone.
        self._check_tails = np.zeros(self.layout.n_rows, dtype=np.bool_)
        self._swapped: SwappedPages | None = None
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
        """Bytes of the device pages held, or of what they take while swapped out: shared and
        reserved ones and the stores of the device tier included."""
        return self._live_bytes + sum(store.bytes for store in self._device_stores())

    @property
    def host_bytes(self) -> int:
        """Bytes of the pages held by stores in the host tier."""
        return sum(s.bytes for s in self.stores.values() if s.tier is not self.tier)

    def layer_room(self) -> IntArray:
        """Tokens that are reserved and not yet used, per layer, int32 [layers]."""
        starts = [self.layout.rows(layer).start for layer in range(len(self.layout.layers))]
        room = np.where(self._check_tails, 0, self._row_room())
        fewest: IntArray = np.minimum.reduceat(room, starts)
        return np.zeros_like(fewest) if self._absent else fewest

    def reserve(self, n: int, layers: range | None = None) -> None:
        """Make room for `n` more tokens in every row of these layers (None: all).

        A partly filled last page that is shared with a fork is copied first, so that writing
        the new tokens leaves the other branch as it is.

        Raises:
            OutOfPages: too few pages are free; nothing was changed.
            ValueError: `layers` is not a run of consecutive layers.
        """
        if n <= 0 or (layers is None and n <= self._room):
            return
        self._require_resident()
        span = self._span(layers)
        page_size = self.layout.page_size
        lengths, counts = self.lengths[span], self.page_counts[span]
        extra = np.maximum(-(-(lengths + n) // page_size) - counts, 0)
        rows = np.arange(span.start, span.stop, dtype=np.int32)
        unsure = rows[self._check_tails[span] & (lengths % page_size > 0)]
        tails = self.lengths[unsure] // page_size
        shared = self.tier.shared(self.tables[unsure, tails], self.row_pools[unsure])
        fresh = self.row_pools[np.repeat(rows, extra)]
        ids = self.tier.allocate(np.concatenate([fresh, self.row_pools[unsure[shared]]]))
        self._append_pages(rows, extra, ids[: fresh.size])
        self._replace(unsure[shared], tails[shared], ids[fresh.size :])
        written = self.tables[unsure, tails]
        self.tier.changing(written, self.row_pools[unsure])  # full once, it may have a copy
        if self._column_names:
            self.tier.clear(ids[: fresh.size], fresh, self._column_names)
            ends = self.lengths[unsure] % page_size
            self.tier.clear_from(written, ends, self.row_pools[unsure], self._column_names)
        self._check_tails[span] = False
        self._settle()

    def advance(self, n: int, layers: range | None = None) -> None:
        """Count `n` tokens that were appended to every row of these layers (None: all).

        `next_position` moves on only when the layers are all of them.

        Raises:
            PageError: fewer than `n` tokens were reserved.
        """
        if layers is not None and len(layers) < len(self.layout.layers):
            self._advance_some(n, self._span(layers))
            return
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
        if self._until_trim > 0 or self._absent is not None:
            return
        rows = self.layout.window_rows
        drop = np.maximum(self.lengths[rows] - self.layout.windows + 1, 0) // self.layout.page_size
        self._drop_front(rows, drop)

    def drop_front(self, layer: int, pages: IntArray) -> None:
        """Free leading pages of each KV head of a layer, with the tokens in them.

        Args:
            layer: the layer.
            pages: how many, at most the full pages of each head, int32 [kv_heads].

        Raises:
            PageError: a head has fewer full pages; nothing was changed.
        """
        rows = self._rows_of(layer)
        full = self.lengths[rows] // self.layout.page_size
        if (pages > full).any():
            raise PageError(f"{pages.tolist()} pages to drop of {full.tolist()} full ones")
        self._drop_front(np.arange(rows.start, rows.stop, dtype=np.int32), pages)

    def keep(self, layer: int, indices: Sequence[IntArray]) -> IntArray:
        """Keep some tokens of each KV head of a layer, and free the pages that this leaves empty.

        The kept tokens move to the front with all their fields, positions and side columns
        included. Pages shared with a fork are not written: their tokens move to new pages.

        Args:
            layer: the layer.
            indices: per KV head the tokens to keep, ascending indices within 0 .. length - 1,
                integers [kept]; heads may keep different numbers of tokens, or none.

        Returns:
            Per head the first page whose tokens are not what they were, int32 [kv_heads]; the
            number of pages if none is. Summaries from there on are the caller's to build again.

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: indices that do not ascend or lie outside; nothing was changed.
        """
        rows = self._rows_of(layer)
        self._put_in_order(rows)
        return self._compact(
            rows, plan_compaction(self.lengths[rows], indices, self.layout.page_size)
        )

    def take_out(self, layers: int | range, tokens: IntArray) -> None:
        """Let at most one token of each head go, and give its place to the token that lies last.

        Nothing else moves, which makes this the cheapest eviction; the tokens are numbered as
        before. A page that a head empties by it is kept for its next token.

        Args:
            layers: whose heads; without a window, in which tokens must lie in order.
            tokens: the token of each head that goes, -1 for none, integers [kv_heads].

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: no such tokens, or a window; nothing was changed.
        """
        rows, size = self._rows_of(layers), self.layout.page_size
        lengths = self.lengths[rows]
        if np.isin(np.arange(rows.start, rows.stop), self.layout.window_rows).any():
            raise ValueError(
                f"single tokens taken out of layers {layers}, one of which has a window"
            )
        if tokens.shape != lengths.shape or ((tokens < -1) | (tokens >= lengths)).any():
            raise ValueError(
                f"the tokens to take out must be -1 .. length - 1 for heads of {lengths.tolist()} "
                f"tokens, got {tokens.tolist()}"
            )
        head = np.flatnonzero(tokens >= 0)
        row, last = (head + rows.start).astype(np.int32), lengths[head] - 1
        slot = self._order.slots(rows, int(lengths.max()))[head, tokens[head]]
        self._own_each(np.concatenate([row, row]), np.concatenate([slot, last]) // size)
        self._order.take_out(row, tokens[head], lengths[head])
        source = (self.tables[row, last // size], last % size)
        target = (self.tables[row, slot // size], slot % size)
        self.tier.move_tokens(source, target, self.row_pools[row])
        if self._column_names:
            self.tier.clear_rows(*source, self.row_pools[row], self._column_names)
            begun = last % size == 0
            self.tier.clear(source[0][begun], self.row_pools[row[begun]], self._column_names)
        self.lengths[row] = last
        row = row[self.page_counts[row] > last // size + 1]
        self._free_pages(row, self.lengths[row] // size + 1)
        self._settle()

    def retract(self, n: int, kept: Sequence[int]) -> IntArray:
        """Of the last `n` tokens of every row, keep some and free the pages of the others.

        This takes back the rejected tokens of a draft, at a cost that does not depend on the
        context's length. Call it before `trim`, which goes by the rows' lengths. Kept tokens keep
        the position they were written with; `next_position` goes back by n - len(kept).

        Args:
            n: how many tokens at the end of each row are in question.
            kept: ascending offsets among them, within 0 .. n - 1.

        Returns:
            Per row the first page whose tokens are not what they were, as `keep` does, int32
            [rows].

        Raises:
            OutOfPages: the copies of shared pages do not fit; nothing was changed.
            ValueError: a row holds fewer tokens, or the offsets do not ascend or lie outside.
        """
        self._require_resident()
        rows = self._span(None)
        plan = plan_retraction(self.lengths, n, kept, self.layout.page_size)
        if n and not self._order.ends_in_order(self.lengths, n):
            self._put_in_order(rows)
        changed = self._compact(rows, plan)
        self.next_position -= n - len(kept)
        return changed

    def fork(self) -> SequenceCache:
        """A second sequence with the same contents, sharing all pages that hold tokens.

        Either branch copies a shared page before it writes to it. Stores are shared whole.
        """
        self._require_resident()
        other = SequenceCache(self.cache, self.layout.columns)
        self.share_into(other, self._used())
        other.next_position = self.next_position
        other._order = self._order.copy()
        other.stores = {name: store.fork() for name, store in self.stores.items()}
        for branch in (self, other):
            branch._check_tails[:] = True
            branch._may_share[:] = True
            branch._settle()
        return other

    def append_from(
        self,
        other: SequenceCache,
        turn: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        """Append a copy of all tokens of another sequence, behind the next position of this one.

        Positions grow by `next_position`, and what windows have dropped of the other sequence is
        not there. Side columns are zero.

        Args:
            other: a sequence of the same cache, the heads of each of whose layers hold the same
                tokens, in live pages.
            turn: called with a layer and keys [kv_heads, n, k_dim] of it; these keys as they are
                at their new positions.

        Raises:
            OutOfPages: too few pages are free; nothing was appended.
        """
        self._require_resident()
        layers = range(len(self.layout.layers))
        counts = [int(other.lengths_of(layer)[0]) for layer in layers]
        if len(set(counts)) == 1:
            self.reserve(counts[0])
        else:
            for layer, n in zip(layers, counts, strict=True):
                self.reserve(n, range(layer, layer + 1))
        for layer, n in zip(layers, counts, strict=True):
            for start in range(0, n, _PIECE):
                self._append_piece(layer, other, start, min(start + _PIECE, n), turn)
        self.next_position += other.next_position
        self._settle()

    def _append_piece(
        self,
        layer: int,
        other: SequenceCache,
        start: int,
        stop: int,
        turn: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        """Append the tokens start .. stop - 1 of a layer of another sequence."""
        rows = self._rows_of(layer)
        k, v = other.keys_values(layer, start, stop)
        own = other._rows_of(layer).start
        position = other.read_tokens(slice(own, own + 1), "position", start, stop)[0, :, 0]
        pages, pool = self.paged(rows), self.pool(rows)
        moves.append(
            pages.data,
            pool.format,
            pages.tables,
            pages.lengths,
            torch.tensor([0, stop - start], device=k.device),
            turn(layer, k).transpose(0, 1),
            v.transpose(0, 1),
            position + self.next_position,
        )
        self.lengths[rows] += np.int32(stop - start)

    def adopt(self, ids: IntArray, counts: IntArray, n_pages: int) -> None:
        """Begin, while empty, with full pages that somebody else holds too.

        Args:
            ids: each row's pages, int32 [rows, >= counts]; they hold tokens up to one position.
            counts: how many of them each row takes, int32 [rows].
            n_pages: how many pages of tokens precede the next one, gone from a window or not.

        Raises:
            PageError: the sequence holds pages already.
        """
        self._require_resident()
        if self.page_counts.any():
            raise PageError("a sequence that holds pages cannot begin with others")
        self.tables, self.page_counts = ids.astype(np.int32), counts.astype(np.int32)
        self.lengths = self.page_counts * np.int32(self.layout.page_size)
        self.next_position = n_pages * self.layout.page_size
        self.tier.retain(*self.held())
        self.note_shared()
        self._settle()

    def note_shared(self) -> None:
        """Note that somebody else may have come to hold full pages of any row, so that these are
        copied before they are written."""
        self._may_share[:] = True

    def swap_out(self) -> None:
        """Copy the device's pages to host memory and free them. Sharing with forks is given up.

        Stores of the device tier go with the live pages; those of the host tier stay. Pages of
        which host memory holds a copy since an earlier time are not copied again.

        Raises:
            OutOfSwap: the cache's `swap_bytes` do not hold them; nothing was changed.
        """
        self._require_resident()
        used, full = self._used(), self.lengths // self.layout.page_size
        parts = [(self, used), *((store, store.page_counts) for store in self._device_stores())]
        ids, pools = map(np.concatenate, zip(*(part.held(n) for part, n in parts), strict=True))
        final = np.ones(ids.size, dtype=np.bool_)
        final[: used.sum()] = ragged_arange(used) < np.repeat(full, used)
        ids, first, place = np.unique(ids, return_index=True, return_inverse=True)
        pools, final = pools[first], final[first]
        copies = self.cache.copies.hold(ids, pools, final)
        self._swapped = SwappedPages(copies, pools, final, place)
        for part, n in parts:
            self.tier.release(*part.held())
            part.page_counts = n
        self._live_bytes = self._bytes(used)
        self._room = 0
        self._absent = "swapped out"

    def swap_in(self, *, beside: bool = False) -> None:
        """Bring swapped pages back to the device. The copies of full ones stay as long as there is
        room for them (`HostCopies`).

        Args:
            beside: whether they may come while the device goes on, where it can. Then all but
                `swap_out` and `free` must wait until `PagedCache.arrive` was called.

        Raises:
            OutOfPages: too few pages are free; nothing was changed.
        """
        swapped = self._swapped
        if swapped is None:
            raise PageError("swap_in of a sequence that is not swapped out")
        ids = self.tier.allocate(swapped.pools)
        self.cache.copies.restore(swapped.copies, swapped.pools, swapped.final, ids, beside=beside)
        more = np.bincount(swapped.place, minlength=ids.size) - 1
        self.tier.retain(np.repeat(ids, more), np.repeat(swapped.pools, more))
        tables = list(self._device_tables())
        ends = np.cumsum([part.page_counts.sum() for part in tables])[:-1]
        for part, of_part in zip(tables, np.split(ids[swapped.place], ends), strict=True):
            part.hold(of_part)
        self._swapped = None
        self._absent = None
        self._may_share[:] = False
        self._settle()

    def free(self) -> None:
        """Give everything back, on the device or in host memory; again does nothing."""
        if self._absent == "freed":
            return
        if self._swapped is not None:
            self.cache.copies.drop(self._swapped.copies, self._swapped.pools)
            self._swapped = None
            for tables in self._device_tables():
                tables.page_counts[:] = 0  # the pages were freed when they were swapped out
        for store in self.stores.values():
            store.free()
        self.release_all()
        self._absent = "freed"
        self._live_bytes = 0
        self._room = 0

    def held_pages(self) -> tuple[IntArray, IntArray]:
        """Ids of the pages held on the device and their pools, int32 [entries] each; a page that
        two layers of a store share is there twice."""
        tables = [] if self.swapped else list(self._device_tables())
        nothing = np.zeros(0, dtype=np.int32)
        ids, pools = zip((nothing, nothing), *(part.held() for part in tables), strict=True)
        return np.concatenate(ids), np.concatenate(pools)

    # --- stores ---------------------------------------------------------------------------------

    def add_store(self, name: str, formats: Mapping[int, PageFormat], tier: str = "device") -> None:
        """Declare a store: pages beside the live ones, of formats of the caller's choice.

        Args:
            name: what to call it.
            formats: the page format of each layer that it is to cover. Page sizes may differ from
                the live pages'; to be read by attention kernels its fields must begin with those
                of `PageFormat.dense`.
            tier: "device", or "host" for pages in the cache's `host_bytes`.

        Raises:
            ConfigError: the tier is unknown, or a page does not fit the blocks of its memory.
            PageError: there is a store of this name already, or the model has no such layer.
        """
        self._require_resident()
        layers = self.layout.layers
        if name in self.stores or not formats or not set(formats) <= set(range(len(layers))):
            raise PageError(
                f"store {name!r} for layers {[*formats]} cannot be added beside {[*self.stores]} "
                f"to a model of {len(layers)} layers"
            )
        kv_heads = {layer: layers[layer].kv_heads for layer in formats}
        self.stores[name] = Store(name, self.cache.tier(tier), formats, kv_heads)

    def put(
        self,
        name: str,
        layers: Sequence[int],
        n_tokens: int,
        fields: Mapping[str, torch.Tensor],
        heads: Sequence[int] | None = None,
    ) -> None:
        """Append tokens to a store, in fresh pages that are then final.

        Args:
            name: the store.
            layers: whom the tokens belong to; several layers (of one format and as many KV heads)
                hold the same pages, which count once.
            n_tokens: how many tokens every head gets. Earlier puts must have filled their pages.
            fields: every field of the format, in its dtype: [kv_heads, n_tokens, width] where it
                has a row per token, [kv_heads, pages, rows, width] where it has rows per page.
            heads: ascending KV heads that the tokens are for, which the fields' first dimension
                then counts; None for all.

        Raises:
            OutOfPages: too few pages are free in the store's tier; nothing was changed.
            PageError: unknown store or layer, or a head's last page is partly filled.
            ValueError: fields that do not fit the format; nothing was changed.
        """
        self._store(name).put(layers, n_tokens, fields, heads)

    def store_length(self, name: str, layer: int) -> IntArray:
        """Tokens that a store holds of a layer, int32 [kv_heads]."""
        store = self._store(name)
        return store.lengths[store.rows(layer)].copy()

    def stored(
        self,
        name: str,
        layer: int,
        first_page: int = 0,
        last_page: int | None = None,
        fields: Sequence[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """A copy of some fields (None: all) of pages first_page .. last_page - 1 (None: to the
        end) of a store.

        Returns:
            The fields by name, in the memory of the store's tier: [kv_heads, tokens, width] where
            a field has a row per token, [kv_heads, pages, rows, width] where it has rows per page.
            Both end with the longest head; what shorter heads lack is zero.
        """
        return self._store(name).read(layer, first_page, last_page, fields)

    def store_pages(self, name: str, layer: int) -> PagedKV:
        """A store's pages of one layer as attention kernels read them, on the device (n = 1).

        Pages in host memory are read where they lie if the device is the CPU, and otherwise
        copied to a temporary tensor.

        Raises:
            PageError: the format does not begin with keys, values and positions.
        """
        return self._store(name).pages(layer, self.tier.arena.data.device)

    def clear_store(self, name: str, layer: int) -> None:
        """Give back a store's pages of one layer; pages that another layer holds stay with it."""
        self._store(name).clear(layer)

    # --- helpers --------------------------------------------------------------------------------

    def _store(self, name: str) -> Store:
        self._require_resident()
        if name not in self.stores:
            raise PageError(f"there is no store {name!r} among {[*self.stores]}")
        return self.stores[name]

    def _device_stores(self) -> Iterator[Store]:
        return (store for store in self.stores.values() if store.tier is self.tier)

    def _device_tables(self) -> Iterator[PageTables]:
        """Everything that holds pages of the device, the live pages first."""
        return chain([self], self._device_stores())

    def _advance_some(self, n: int, span: slice) -> None:
        """Count `n` tokens that were appended to some rows."""
        room = 0 if self._check_tails[span].any() else int(self._row_room()[span].min())
        if n > room or self._absent is not None:
            raise PageError(f"{n} tokens appended to some layers, {room} reserved")
        self.lengths[span] += n
        self._settle()

    def _drop_front(self, rows: IntArray, drop: IntArray) -> None:
        """Free the first drop[i] pages, which are full, of rows[i]."""
        rows, drop = rows[drop > 0], drop[drop > 0].astype(np.int32)
        if not rows.size:
            return
        self._put_in_order(rows)
        width = int(self.page_counts[rows].max())
        old = self.tables[rows, :width]
        columns = np.arange(width, dtype=np.int32)
        gone_row, gone_column = np.nonzero(columns < drop[:, None])
        self.tier.release(old[gone_row, gone_column], self.row_pools[rows[gone_row]])
        left = np.minimum(columns + drop[:, None], width - 1)
        self.tables[rows, :width] = np.take_along_axis(old, left, axis=1)
        self.page_counts[rows] -= drop
        self.lengths[rows] -= drop * self.layout.page_size
        self._settle()

    def _compact(self, rows: slice, plan: Compaction) -> IntArray:
        """Carry out the moves planned for some rows, and free the pages that they leave."""
        first_row = np.int32(rows.start)
        page_size = self.layout.page_size
        pages_kept = -(-plan.lengths // page_size)
        index = np.arange(rows.start, rows.stop, dtype=np.int32)
        written = pages_kept - plan.first_page
        self._own(
            np.repeat(index, written),
            np.repeat(plan.first_page, written) + ragged_arange(written),
        )
        row = plan.head + first_row
        self.tier.move_tokens(
            (self.tables[row, plan.source // page_size], plan.source % page_size),
            (self.tables[row, plan.target // page_size], plan.target % page_size),
            self.row_pools[row],
        )
        self._free_pages(index, pages_kept)
        self.lengths[rows] = plan.lengths
        self._check_tails[rows] = True
        self._settle()
        return plan.first_changed

    def _free_pages(self, rows: IntArray, kept: IntArray) -> None:
        """Free all but the first kept[i] pages of rows[i]."""
        surplus = self.page_counts[rows] - kept
        if not surplus.any():
            return
        row = np.repeat(rows, surplus)
        page = np.repeat(kept, surplus) + ragged_arange(surplus)
        self.tier.release(self.tables[row, page], self.row_pools[row])
        self.page_counts[rows] = kept

    def _settle(self) -> None:
        """Work out the numbers that spare most steps a look at the tables."""
        self.width = int(self.page_counts.max())
        self._live_bytes = self._bytes(self.page_counts)
        self._room = 0 if self._check_tails.any() else int(self._row_room().min())
        rows = self.layout.window_rows
        if rows.size:
            page_size = self.layout.page_size
            shortest = (self.layout.windows - 1 + page_size - self.lengths[rows]).min()
            self._until_trim = int(shortest)
        else:
            self._until_trim = _NEVER

    def _row_room(self) -> IntArray:
        """Slots of the pages held that hold no token, int32 [rows]."""
        room: IntArray = self.page_counts * self.layout.page_size - self.lengths
        return room

    def _used(self) -> IntArray:
        """Pages of each row that hold tokens, int32 [rows]."""
        used: IntArray = -(-self.lengths // self.layout.page_size)
        return used

    def _bytes(self, counts: IntArray) -> int:
        return self.layout.bytes_of(self.layout.count(counts))
