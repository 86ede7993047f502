"""Pages of one format: allocation, reference counts, exact byte accounting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tamis.cache import moves
from tamis.cache.arena import Arena
from tamis.cache.format import UNIT, PageFormat
from tamis.platform import native_for

_PIECE_BYTES = 1 << 26
_CACHED_BYTES = 1 << 19  # what is read into a buffer and written from it stays in a core's cache
_PIECE_TOKENS = 1 << 16

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


class OutOfPages(Exception):  # noqa: N818 - an event for the scheduler, not a failure
    """An allocation did not fit; nothing was changed."""


class PageError(AssertionError):
    """The cache was misused: a page freed twice, an unknown id, a write without a reservation."""


class Watcher(Protocol):
    """Whoever must know when pages are no longer what they were (`PoolCopies`)."""

    def changing(self, slots: IntArray) -> None:
        """Note that pages are about to be written, or are freed: their slots, int32 [n], each
        once or more often."""


class PagePool:
    """Pages of one format in an arena.

    Pages are reference-counted: `allocate` gives a page one reference, `retain` adds one,
    `release` drops one and frees the page with the last. Freed pages are reused last in, first
    out, while they are still in the processor's caches. All operations are on whole arrays of
    ids, int32 [n].
    """

    def __init__(self, arena: Arena, format: PageFormat) -> None:
        self.arena = arena
        self.format = format
        self.page_bytes = format.page_bytes
        self.pages_per_block = arena.block_bytes // format.page_bytes
        self._block_units = arena.block_bytes // UNIT
        self._page_units = format.page_bytes // UNIT
        # A slot numbers the pages densely: block * pages_per_block + page within the block.
        n_slots = arena.n_blocks * self.pages_per_block
        self._references = np.zeros(n_slots, dtype=np.int32)
        self._held = np.zeros(arena.n_blocks, dtype=np.bool_)
        self._used = np.zeros(arena.n_blocks, dtype=np.int32)  # pages in use per block
        self._stack = np.empty(n_slots, dtype=np.int32)  # free slots of held blocks
        self._n_free = 0
        self._pages_in_use = 0
        self._pages_peak = 0
        self._watcher: Watcher | None = None
        self._views: dict[str, torch.Tensor] = {}
        self._words = self._indexable(self.words())
        self._rows = {
            field.name: self._indexable(as_integers(self.view(field.name)))
            for field in format.fields
        }
        arena.register(self)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages in use."""
        return self._pages_in_use * self.page_bytes

    @property
    def bytes_peak(self) -> int:
        """The most bytes that were in use at once."""
        return self._pages_peak * self.page_bytes

    @property
    def n_slots(self) -> int:
        """Pages that there could be, in use or not."""
        return self._references.size

    @property
    def free_pages(self) -> int:
        """Pages that `allocate` could give now, with those that the arena would still add."""
        return self._n_free + self.arena.obtainable_blocks(self) * self.pages_per_block

    @property
    def empty_blocks(self) -> int:
        """Blocks held in which no page is in use."""
        return int(np.count_nonzero(self._empty()))

    def blocks_short(self, n: int) -> int:
        """Blocks that the arena must add before `n` pages can be allocated."""
        if n <= self._n_free:
            return 0
        if self.pages_per_block == 0:
            return self.arena.n_blocks + 1  # never: a block is smaller than a page
        return -(-(n - self._n_free) // self.pages_per_block)

    def allocate(self, n: int) -> IntArray:
        """Take `n` pages with one reference each: their ids, int32 [n]. Contents are undefined.

        Raises:
            OutOfPages: fewer than `n` pages are free; none was taken.
        """
        missing = self.blocks_short(n)
        if missing > self.arena.free_blocks:
            self.arena.reclaim()
            missing = self.blocks_short(n)
            if missing > self.arena.free_blocks:
                raise OutOfPages(f"{n} pages wanted, {self.free_pages} free")
        if missing:
            self._add_blocks(self.arena.take(missing))
        top = self._n_free
        slots = self._stack[top - n : top][::-1].copy()
        self._n_free = top - n
        self._references[slots] = 1
        blocks = slots // self.pages_per_block
        np.add.at(self._used, blocks, 1)
        self._pages_in_use += n
        self._pages_peak = max(self._pages_peak, self._pages_in_use)
        self.arena.account(n * self.page_bytes)
        return self._ids(slots)

    def retain(self, ids: IntArray) -> None:
        """Add one reference to each page (one per occurrence in `ids`).

        Raises:
            PageError: an id is not a page in use; nothing was changed.
        """
        np.add.at(self._references, self.slots(ids), 1)

    def release(self, ids: IntArray) -> None:
        """Drop one reference of each page (one per occurrence in `ids`); free those without any.

        Raises:
            PageError: an id is not a page in use, or occurs more often than it has references;
                nothing was changed.
        """
        slots = self.slots(ids)
        np.subtract.at(self._references, slots, 1)
        left = self._references[slots]
        if left.size and left.min() < 0:
            np.add.at(self._references, slots, 1)
            raise PageError("a page was released more often than it was allocated and retained")
        freed = np.unique(slots[left == 0])[::-1]
        n = freed.size
        if n == 0:
            return
        if self._watcher is not None:
            self._watcher.changing(freed)
        self._stack[self._n_free : self._n_free + n] = freed
        self._n_free += n
        np.subtract.at(self._used, freed // self.pages_per_block, 1)
        self._pages_in_use -= n
        self.arena.account(-n * self.page_bytes)

    def references(self, ids: IntArray) -> IntArray:
        """Reference count of each page, int32 [n].

        Raises:
            PageError: an id is not a page in use.
        """
        return self._references[self.slots(ids)]

    def view(self, name: str) -> torch.Tensor:
        """All pages' rows of one field, `[page ids, rows, width]`; see PageFormat.view."""
        if name not in self._views:
            self._views[name] = self.format.view(self.arena.data, name)
        return self._views[name]

    def words(self) -> torch.Tensor:
        """All possible pages as opaque words, int64 `[page ids, page_bytes / 8]`."""
        data = self.arena.data
        return data.view(torch.int64).as_strided(
            (self.format.n_ids(data), self.page_bytes // 8), (UNIT // 8, 1), 0
        )

    def gather(self, ids: IntArray, name: str) -> torch.Tensor:
        """A copy of one field of whole pages, `[*ids.shape, rows, width]`, where the pages lie."""
        if (extension := native_for(None, self.arena.data)) is not None:
            return moves.gather(extension, self.arena.data, self.format, name, ids)
        rows = torch.as_tensor(self._rows[name][self._index(ids)])
        return rows.view(self.format.field(name).dtype)

    def scatter(self, ids: IntArray, name: str, values: torch.Tensor) -> None:
        """Overwrite one field of whole pages with `values` [n, rows, width] of its dtype."""
        self.changing(ids)
        if (extension := native_for(None, self.arena.data)) is not None:
            moves.scatter(extension, self.arena.data, self.format, name, ids, values)
        else:
            self._rows[name][self._index(ids)] = self._elements(values)

    def scatter_rows(self, ids: IntArray, rows: IntArray, name: str, values: torch.Tensor) -> None:
        """Overwrite row rows[i] of page ids[i] in one field, `values` [n, width] of its dtype."""
        self.changing(ids)
        self._rows[name][self._index(ids), self._index(rows)] = self._elements(values)

    def clear(self, ids: IntArray, names: Iterable[str]) -> None:
        """Set some fields of whole pages to zero."""
        self.changing(ids)
        index = self._index(ids)
        for name in names:
            self._rows[name][index] = 0

    def clear_from(self, ids: IntArray, first: IntArray, names: Iterable[str]) -> None:
        """Set rows first[i] and later of page ids[i] to zero, in those of the fields that have a
        row per token."""
        counts = self.format.page_size - first
        rows = np.repeat(first, counts) + ragged_arange(counts)
        self.clear_rows(np.repeat(ids, counts), rows, names)

    def clear_rows(self, ids: IntArray, rows: IntArray, names: Iterable[str]) -> None:
        """Set row rows[i] of page ids[i] to zero, in those of the fields that have a row per
        token."""
        self.changing(ids)
        index, within = self._index(ids), self._index(rows)
        for name in names:
            if self.format.field(name).rows is None:
                self._rows[name][index, within] = 0

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy whole pages, byte for byte, to other pages."""
        self.copy_from(self, source, target)

    def copy_from(self, other: PagePool, source: IntArray, target: IntArray) -> None:
        """Copy whole pages, byte for byte, of a pool of the same format.

        Args:
            other: that pool, in whatever memory.
            source: its pages, int32 [n].
            target: where they go in this pool, int32 [n], each once and none of them a source.
        """
        self.changing(target)
        data, others = self.arena.data, other.arena.data
        if (extension := native_for(None, data, others)) is not None:
            moves.copy_pages(extension, self.format, (others, source), (data, target))
            return
        device = data.device
        # By indexing twice, there is a copy between, which is to stay in the processor's caches;
        # on a device, it may not fit beside the arena as a whole.
        on_host = {device.type, others.device.type} == {"cpu"}
        piece_bytes = _CACHED_BYTES if on_host else _PIECE_BYTES
        source_index, target_index = other._index(source), self._index(target)
        for piece in _pieces(source.size, piece_bytes // self.page_bytes):
            words = torch.as_tensor(other._words[source_index[piece]]).to(device)
            self._words[target_index[piece]] = self._indexable(words)

    def read(self, ids: IntArray) -> torch.Tensor:
        """A copy of whole pages in host memory, as opaque words, int64 [n, page_bytes / 8]."""
        words = torch.empty((ids.size, self.page_bytes // 8), dtype=torch.int64)
        # In pieces: on a device, the whole may not fit beside the arena.
        for piece in _pieces(ids.size, _PIECE_BYTES // self.page_bytes):
            words[piece] = torch.as_tensor(self._words[self._index(ids[piece])])
        return words

    def move_tokens(
        self,
        source: tuple[IntArray, IntArray],
        target: tuple[IntArray, IntArray],
        *,
        at_once: bool = False,
    ) -> None:
        """Copy tokens with all their fields between pages; fields of whole pages stay.

        Moves are made in their order, but many at once: a token may lie where an earlier move
        reads, not where an earlier move writes.

        Args:
            source: page ids and rows within the page, int32 [n] each.
            target: the same, for where they go.
            at_once: whether all are read before any is written, so that tokens may change places;
                it takes memory for a copy of them.
        """
        self.changing(source[0])
        self.changing(target[0])
        n = source[0].size
        if (extension := native_for(None, self.arena.data)) is not None:
            moves.move_tokens(extension, self.arena.data, self.format, source, target, at_once)
            return
        for piece in _pieces(n, n if at_once else _PIECE_TOKENS):
            source_page, source_row = (self._index(array[piece]) for array in source)
            target_page, target_row = (self._index(array[piece]) for array in target)
            for field in self.format.fields:
                if field.rows is None:
                    rows = self._rows[field.name]
                    rows[target_page, target_row] = rows[source_page, source_row]

    def watch(self, watcher: Watcher) -> None:
        """Have somebody told, from now on, before pages change or are freed."""
        self._watcher = watcher

    def changing(self, ids: IntArray) -> None:
        """Note that pages are about to be other than they were, as every operation here does
        itself: for those who write to the arena's bytes, and who hold fewer of a page's tokens.

        Raises:
            PageError: an id is not a page in use.
        """
        if self._watcher is not None:
            self._watcher.changing(self.slots(ids))

    def give_back(self) -> None:
        """Return every empty block to the arena."""
        empty = self._empty()
        if not empty.any():
            return
        free = self._stack[: self._n_free]
        kept = free[~empty[free // self.pages_per_block]]
        self._stack[: kept.size] = kept
        self._n_free = kept.size
        self._held[empty] = False
        self.arena.put(np.flatnonzero(empty).astype(np.int32)[::-1])

    def _empty(self) -> npt.NDArray[np.bool_]:
        empty: npt.NDArray[np.bool_] = self._held & (self._used == 0)
        return empty

    def _add_blocks(self, blocks: IntArray) -> None:
        self._held[blocks] = True
        # Downwards within and across blocks, so that pages leave the stack in ascending order.
        within = np.arange(self.pages_per_block - 1, -1, -1, dtype=np.int32)
        slots = (blocks[::-1, None] * self.pages_per_block + within).ravel()
        # Under the pages that were freed before, which are the warm ones.
        n = self._n_free
        self._stack[slots.size : slots.size + n] = self._stack[:n].copy()
        self._stack[: slots.size] = slots
        self._n_free += slots.size

    def _ids(self, slots: IntArray) -> IntArray:
        block, page = np.divmod(slots, self.pages_per_block)
        ids: IntArray = block * self._block_units + page * self._page_units
        return ids

    def slots(self, ids: IntArray) -> IntArray:
        """The dense numbers of pages in use, 0 .. n_slots - 1, int32 [n].

        Raises:
            PageError: an id is not a page in use.
        """
        block, units = np.divmod(ids, self._block_units)
        page, rest = np.divmod(units, self._page_units)
        slots: IntArray = block * self.pages_per_block + page
        if ids.size and (
            rest.any()
            or page.max() >= self.pages_per_block
            or slots.min() < 0
            or slots.max() >= self._references.size
            or self._references[slots].min() <= 0
        ):
            raise PageError("a page id that is not in use was given to the pool")
        return slots

    # What the native kernels do not copy is copied by indexing with arrays. On the CPU numpy does
    # that several times faster than torch, because it copies rows and starts no threads; the
    # syntax is one.

    def _indexable(self, tensor: torch.Tensor) -> Any:
        return tensor.numpy() if tensor.device.type == "cpu" else tensor

    def _elements(self, values: torch.Tensor) -> Any:
        """Values as this pool's rows take them."""
        return self._indexable(as_integers(values.detach().to(self.arena.data.device)))

    def _index(self, array: IntArray) -> Any:
        return self._indexable(torch.from_numpy(array.astype(np.int64)).to(self.arena.data.device))


def ragged_arange(counts: IntArray) -> IntArray:
    """0 .. count - 1 for each of the `counts`, one after the other, int32 [sum of counts]."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total, dtype=np.int32) - np.repeat((ends - counts).astype(np.int32), counts)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as integers of the same size, for numpy, which knows no bfloat16."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def _pieces(n: int, size: int) -> Iterator[slice]:
    """Cut 0 .. n - 1 into runs of at most `size` (at least 1)."""
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, n, size))
