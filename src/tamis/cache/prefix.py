"""What sequences have computed, kept for those that begin with the same tokens: a tree of pages."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tamis.cache.copies import OutOfSwap
from tamis.cache.format import Field
from tamis.cache.paged import PagedCache
from tamis.cache.pool import BoolArray, IntArray, OutOfPages, PageError
from tamis.cache.sequence import SequenceCache

_TOKEN = np.dtype(np.int32)


@dataclass(eq=False)
class Block:
    """One page of tokens below the blocks before it, with the pages that hold their KV.

    Attributes:
        columns: the side columns of the pages of its tree.
        parent: the block before it, None for a root, which has no tokens and no pages.
        tokens: its token ids, as bytes of int32.
        depth: blocks from the first to this one.
        ids: the page of each row, int32 [rows]; held: which of them it has, bool [rows].
        copy: while it has none, the copies in host memory of those that it had, int32 [m];
            copied: of which rows, bool [rows].
        children: the blocks that follow it, by their tokens; residents: how many of them have
            pages. Blocks that follow a copied one are copied too.
        users: sequences that share it or a block below it; it stays while there are any.
        hits: how often a sequence asked for it, the one that computed it among them.
        value: what it is worth to keep, see `PrefixTree`; used: when it was last used.
    """

    columns: tuple[Field, ...]
    parent: Block | None
    tokens: bytes
    depth: int
    ids: IntArray
    held: BoolArray
    copied: BoolArray
    copy: IntArray | None = None
    children: dict[bytes, Block] = field(default_factory=dict)
    residents: int = 0
    users: int = 0
    hits: int = 0
    value: float = 0.0
    used: int = 0

    def path(self) -> Iterator[Block]:
        """This block and those before it, the root left out."""
        block = self
        while block.parent is not None:
            yield block
            block = block.parent


class PrefixTree:
    """A tree over full pages for every set of side columns. Only this class gives its pages up.

    A block is found by its token ids below its parent, which are compared themselves. It holds one
    reference of the page of every row, beside those of the sequences that share the page. Pages of
    rows with a window may be missing: a prefix can be used if those are there that the next query
    sees (`SequenceCache.trim` says which).

    Blocks that nobody uses are given up from the leaves on: their pages are copied to host memory,
    as far as the cache's `swap_bytes` go, and forgotten there when these are needed; what came back
    from there goes again without being copied, unless its copy had to go (`HostCopies`). Who goes
    first is for GreedyDual-Size-Frequency
    (Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy",
    HP Labs 1998): a block is worth `clock + hits * tokens / bytes`, the tokens that would have to
    be computed again per byte it holds, as often as they were asked for. The least worth goes
    first, and the clock moves on to its worth, so that what is no longer asked for ages. Among
    equals the least recently used goes first. Copies are forgotten in the order in which they were
    made.

    Attributes:
        bytes: of the pages held; no two blocks hold the same page.
        used_bytes: of the blocks that sequences use.
        host_bytes: of the copies in host memory.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.bytes = 0
        self.used_bytes = 0
        self.host_bytes = 0
        self._cache = cache
        self._page_size = cache.layout.page_size
        self._windows = cache.layout.windows
        self._window_rows = cache.layout.window_rows
        self._roots: dict[tuple[Field, ...], Block] = {}
        self._row_bytes: dict[tuple[Field, ...], np.ndarray[Any, np.dtype[np.int64]]] = {}
        self._clock = 0.0
        self._ticks = itertools.count(1)
        self._heap: list[tuple[float, int, int, Block]] = []  # with entries that hold no longer
        self._n_blocks = 0
        self._copies: dict[Block, None] = {}  # oldest first
        self._with_windows: dict[Block, None] = {}  # blocks with pages of rows with windows

    @property
    def idle_bytes(self) -> int:
        """Bytes of the blocks that no sequence uses: `evict` frees them but for the pages that
        something outside the tree still shares."""
        return self.bytes - self.used_bytes

    def match(
        self,
        tokens: Sequence[int],
        n_most: int,
        columns: tuple[Field, ...] = (),
        *,
        resident: bool = False,
    ) -> Block | None:
        """The last block of the longest prefix that a sequence can begin with; nothing is changed.

        Args:
            tokens: the sequence's.
            n_most: the most tokens to find; whole pages of them are found.
            columns: of its pages.
            resident: whether to pass over what is only in host memory.

        Returns:
            None where there is none.
        """
        block = self._roots.get(columns)
        if block is None:
            return None
        data = _as_bytes(tokens[:n_most])
        found: Block | None = None
        missing = np.full(self._windows.size, -1, dtype=np.int32)  # each row's last missing page
        for depth in range(n_most // self._page_size):
            child = block.children.get(self._key(data, depth))
            if child is None or (resident and child.copy is not None):
                break
            block = child
            if missing.size:
                there = block.held | block.copied
                missing[~there[self._window_rows]] = depth
            if (missing < self._first_pages(block.depth)).all():
                found = block
        return found

    def begin(self, block: Block) -> SequenceCache:
        """A new sequence that shares the pages of a prefix (see `match` and `fetch`), and uses it
        until `leave`."""
        sequence = self._cache.new_sequence(block.columns)
        first = np.zeros(block.ids.size, dtype=np.int32)
        first[self._window_rows] = self._first_pages(block.depth)
        path = list(block.path())[::-1]
        ids = np.stack([one.ids for one in path], axis=1)
        column = np.minimum(np.arange(len(path)) + first[:, None], len(path) - 1)
        sequence.adopt(np.take_along_axis(ids, column, axis=1), len(path) - first, len(path))
        self.use(block)
        return sequence

    def fetch(self, block: Block) -> bool:
        """Bring the pages of a prefix back to the device where they are copies in host memory.

        Others are given up for them where need be. False if there is no room even so, and then
        the last of them have stayed where they are.
        """
        self.use(block)
        try:
            away = [one for one in block.path() if one.copy is not None]
            return all(self._bring_back(one) for one in reversed(away))
        finally:
            self.leave(block)

    def count_hit(self, block: Block) -> None:
        """Count that a prefix was asked for and spared its computation."""
        for one in block.path():
            one.hits += 1

    def use(self, block: Block) -> None:
        """Keep a block and those before it until `leave`."""
        for one in block.path():
            one.users += 1
            if one.users == 1:
                self.used_bytes += self._bytes(one)

    def leave(self, block: Block) -> None:
        """Take back one `use` of a block."""
        for one in block.path():
            one.users -= 1
            if one.users == 0:
                self.used_bytes -= self._bytes(one)
                self._value(one)
                self._offer(one)

    def extend(
        self, block: Block | None, tokens: Sequence[int], sequence: SequenceCache
    ) -> Block | None:
        """Take in the full pages of a sequence, from which nothing was evicted.

        Args:
            block: the last block that it uses; None if it uses none.
            tokens: the sequence's, at least as many as it has cached.
            sequence: it goes on to share what it hands in; whoever writes to it copies first.

        Returns:
            The last block of its tokens, which it now uses in place of `block`; None if it has not
            filled a page.

        Raises:
            PageError: a row lacks more than what fell out of its window.
        """
        size, columns = self._page_size, sequence.layout.columns
        n_full = sequence.next_position // size
        at = block or self._root(columns)
        if at.depth >= n_full:
            return block
        gone, odd = np.divmod(sequence.next_position - sequence.lengths, size)
        unwindowed = np.delete(gone, self._window_rows)
        if odd.any() or unwindowed.any():
            raise PageError("a sequence from which tokens were evicted cannot extend a prefix")
        data = _as_bytes(tokens[at.depth * size : n_full * size])
        begin = at.depth
        for depth in range(begin, n_full):
            key = self._key(data, depth - begin)
            present = gone <= depth
            ids = np.where(
                present,
                np.take_along_axis(
                    sequence.tables, np.maximum(depth - gone, 0)[:, None].astype(np.int64), axis=1
                )[:, 0],
                0,
            )
            child = at.children.get(key)
            if child is None:
                child = Block(columns, at, key, depth + 1, *_no_pages(ids.size), hits=1)
                at.children[key] = child
                at.residents += 1
                self._n_blocks += 1
            elif child.copy is not None:
                self._forget_copy(child)
                at.residents += 1
            child.users += 1
            if child.users == 1:
                self.used_bytes += self._bytes(child)
            self._hold(child, ids, present & ~child.held)
            at = child
        sequence.note_shared()
        return at

    def evict(self, n: int = 1) -> int:
        """Take the pages of up to `n` blocks that nobody uses; of how many."""
        given = 0
        while given < n and self._heap:
            value, used, _, block = heapq.heappop(self._heap)
            parent = block.parent
            if parent is None or not _idle(block, used):
                continue
            self._clock = max(self._clock, value)
            kept = self._copy_to_host(block)
            self._drop(block, block.held.copy())
            parent.residents -= 1
            if not kept:
                self._remove(block)
            self._offer(parent)
            given += 1
        return given

    def evict_windows(self) -> bool:
        """Give up the pages of rows with windows that only the tree holds, of all blocks: what a
        running sequence would have freed without it. Whether there were any."""
        before = self.bytes
        tier = self._cache.device_tier
        for block in list(self._with_windows):
            row_pools = self._cache.rows_with(block.columns)[1]
            mine = np.zeros(block.held.size, dtype=np.bool_)
            rows = self._window_rows[block.held[self._window_rows]]
            mine[rows] = ~tier.shared(block.ids[rows], row_pools[rows])
            self._drop(block, mine)
        return self.bytes < before

    def forget_copies(self, n_bytes: int) -> bool:
        """Free so much of the host memory that copies take, from the oldest on; False if they take
        less."""
        target = max(0, self.host_bytes - n_bytes)
        enough = n_bytes <= self.host_bytes
        for block in list(self._copies):
            if self.host_bytes <= target:
                break
            if block.copy is not None and not block.users:
                self._remove(block)
        return enough and self.host_bytes <= target

    def clear(self) -> None:
        """Give up everything that nobody uses, and all copies."""
        while self.evict(64):
            pass
        self.forget_copies(self.host_bytes)

    # --- helpers --------------------------------------------------------------------------------

    def _root(self, columns: tuple[Field, ...]) -> Block:
        if columns not in self._roots:
            layout, _ = self._cache.rows_with(columns)
            self._row_bytes[columns] = np.array([f.page_bytes for f in layout.formats])[
                layout.row_formats
            ]
            self._roots[columns] = Block(columns, None, b"", 0, *_no_pages(layout.n_rows))
        return self._roots[columns]

    def _key(self, data: bytes, page: int) -> bytes:
        """The tokens of one page, of tokens as bytes."""
        width = self._page_size * _TOKEN.itemsize
        return data[page * width : (page + 1) * width]

    def _first_pages(self, depth: int) -> IntArray:
        """The first page that the query after so many blocks sees, of each row with a window."""
        first: IntArray = np.maximum(depth * self._page_size - self._windows + 1, 0)
        return first // self._page_size

    def _bytes(self, block: Block) -> int:
        return int(self._row_bytes[block.columns][block.held].sum())

    def _hold(self, block: Block, ids: IntArray, rows: BoolArray) -> None:
        """Take a reference of the pages of some more rows."""
        if not rows.any():
            return
        before = self._bytes(block)
        self._cache.device_tier.retain(ids[rows], self._cache.rows_with(block.columns)[1][rows])
        block.ids[rows] = ids[rows]
        block.held |= rows
        self._count(block, self._bytes(block) - before)

    def _drop(self, block: Block, rows: BoolArray) -> None:
        """Give back the pages of some rows."""
        before = self._bytes(block)
        self._cache.device_tier.release(
            block.ids[rows], self._cache.rows_with(block.columns)[1][rows]
        )
        block.held &= ~rows
        self._count(block, self._bytes(block) - before)

    def _copy_to_host(self, block: Block) -> bool:
        """Copy a block's pages to host memory, older copies being forgotten for it; False if it has
        no pages, or there is too little memory."""
        cache, n_bytes, rows = self._cache, self._bytes(block), block.held
        pools = cache.rows_with(block.columns)[1][rows]
        while n_bytes:
            try:
                block.copy = cache.copies.hold(block.ids[rows], pools, _all_final(pools))
            except OutOfSwap as error:
                if not self.forget_copies(error.missing):
                    return False
            else:
                block.copied = rows.copy()
                self._copies[block] = None
                self.host_bytes += n_bytes
                return True
        return False

    def _bring_back(self, block: Block) -> bool:
        """Move a block, whose parent has pages, to the device; False if there is no room."""
        cache, parent = self._cache, block.parent
        assert parent is not None
        assert block.copy is not None
        pools = cache.rows_with(block.columns)[1][block.copied]
        while True:
            try:
                ids = cache.device_tier.allocate(pools)
            except OutOfPages:
                if not self.evict():
                    return False
            else:
                break
        cache.copies.restore(block.copy, pools, _all_final(pools), ids)
        block.ids[block.copied] = ids
        block.held = block.copied.copy()
        self._without_copy(block)
        self._count(block, self._bytes(block))
        parent.residents += 1
        return True

    def _forget_copy(self, block: Block) -> None:
        assert block.copy is not None
        pools = self._cache.rows_with(block.columns)[1][block.copied]
        self._cache.copies.drop(block.copy, pools)
        self._without_copy(block)

    def _without_copy(self, block: Block) -> None:
        """Note that the tree holds a block's copies no more."""
        self.host_bytes -= int(self._row_bytes[block.columns][block.copied].sum())
        block.copy = None
        block.copied = np.zeros_like(block.copied)
        del self._copies[block]

    def _remove(self, block: Block) -> None:
        """Take a block without pages out of the tree, and the copies that follow it."""
        assert block.parent is not None
        del block.parent.children[block.tokens]
        for one in [block, *_following(block)]:
            if one.copy is not None:
                self._forget_copy(one)
            one.parent = None
            self._n_blocks -= 1

    def _count(self, block: Block, change: int) -> None:
        self.bytes += change
        if block.users:
            self.used_bytes += change
        if self._window_rows.size and block.held[self._window_rows].any():
            self._with_windows[block] = None
        else:
            self._with_windows.pop(block, None)

    def _value(self, block: Block) -> None:
        """Work out what a block is worth that was used until now."""
        n_bytes = self._bytes(block)
        block.value = self._clock + block.hits * self._page_size / n_bytes if n_bytes else 0.0
        block.used = next(self._ticks)

    def _offer(self, block: Block) -> None:
        """Make a block one that can be given up, if it is."""
        if not _idle(block, block.used):
            return
        if len(self._heap) > 2 * self._n_blocks:
            self._heap = [entry for entry in self._heap if _idle(entry[3], entry[1])]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (block.value, block.used, next(self._ticks), block))


def _idle(block: Block, used: int) -> bool:
    """Whether a block can be given up, and was last used then."""
    resident = block.parent is not None and block.copy is None
    return resident and not block.users and not block.residents and block.used == used


def _following(block: Block) -> list[Block]:
    """All blocks below one."""
    found = list(block.children.values())
    for one in found:
        found += one.children.values()  # the list grows as it is gone through
    return found


def _no_pages(n_rows: int) -> tuple[IntArray, BoolArray, BoolArray]:
    """Ids, held and copied of a block that has no pages."""
    nothing = np.zeros(n_rows, dtype=np.int32)
    return nothing, nothing.astype(np.bool_), nothing.astype(np.bool_)


def _all_final(pools: IntArray) -> BoolArray:
    """Whether the pages of the tree are full, bool [n]."""
    return np.ones(pools.size, dtype=np.bool_)


def _as_bytes(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype=_TOKEN).tobytes()
