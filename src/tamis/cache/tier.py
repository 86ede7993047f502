"""One memory (the device's, or the host's) with its pages of all formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from tamis.cache.arena import Arena
from tamis.cache.format import PageFormat
from tamis.cache.layout import CacheLayout
from tamis.cache.pool import BoolArray, IntArray, OutOfPages, PagePool
from tamis.errors import ConfigError


class Tier:
    """An arena and a pool for every page format that was asked for.

    Operations on many pages take their ids with the numbers of their pools, int32 [n] each.

    Attributes:
        arena: the bytes.
        pools: one per format, in the order in which they were first asked for.
    """

    def __init__(
        self,
        layout: CacheLayout,
        capacity_bytes: int,
        device: torch.device | str,
        *,
        pinned: bool = False,
    ) -> None:
        """Reserve the memory; for `pinned` see `Arena`.

        Raises:
            ConfigError: `capacity_bytes` is negative or beyond what page ids can address.
        """
        block_bytes = layout.block_bytes(capacity_bytes)
        self.arena = Arena(capacity_bytes, device, block_bytes=block_bytes, pinned=pinned)
        self.pools: list[PagePool] = []
        self._layout = layout
        self._numbers: dict[PageFormat, int] = {}

    def number(self, format: PageFormat) -> int:
        """The number of the format's pool, which is made when it is first asked for.

        Raises:
            ConfigError: a page of the format does not fit a block of the arena.
        """
        if format not in self._numbers:
            if format.page_bytes > self.arena.block_bytes:
                enough = self._layout.capacity_for_page(format.page_bytes)
                raise ConfigError(
                    f"a page of {format.page_bytes} bytes ({format.page_size} tokens of "
                    f"{', '.join(field.name for field in format.fields)}) does not fit a memory "
                    f"of {self.arena.capacity_bytes} bytes, which is cut into blocks of "
                    f"{self.arena.block_bytes} bytes; {enough} bytes would do"
                )
            self.add_pool(format)
        return self._numbers[format]

    def add_pool(self, format: PageFormat) -> PagePool:
        """Make the pool of a format that has none; it stays empty where a block holds no page."""
        self._numbers[format] = len(self.pools)
        self.pools.append(PagePool(self.arena, format))
        return self.pools[-1]

    def can_allocate(self, counts: IntArray) -> bool:
        """Whether counts[i] pages of every pool `i` can be allocated together."""

        def blocks_short() -> int:
            pools = zip(self.pools, counts, strict=False)
            return sum(pool.blocks_short(int(n)) for pool, n in pools if n)

        if blocks_short() <= self.arena.free_blocks:
            return True
        self.arena.reclaim()
        return blocks_short() <= self.arena.free_blocks

    def allocate(self, pools: IntArray) -> IntArray:
        """Take one page of each of the pools, int32 [n]: their ids, int32 [n].

        Raises:
            OutOfPages: they do not all fit; none was taken.
        """
        counts = np.bincount(pools, minlength=len(self.pools)).astype(np.int32)
        if not self.can_allocate(counts):
            free = [pool.free_pages for pool in self.pools]
            raise OutOfPages(f"{counts.tolist()} pages wanted, {free} free")
        ids = np.empty(pools.size, dtype=np.int32)
        for i, pool, of_pool in self._split(pools):
            ids[of_pool] = pool.allocate(int(counts[i]))
        return ids

    def retain(self, ids: IntArray, pools: IntArray) -> None:
        """Add one reference to each of the pages."""
        for _, pool, of_pool in self._split(pools):
            pool.retain(ids[of_pool])

    def release(self, ids: IntArray, pools: IntArray) -> None:
        """Drop one reference of each of the pages."""
        for _, pool, of_pool in self._split(pools):
            pool.release(ids[of_pool])

    def shared(self, ids: IntArray, pools: IntArray) -> BoolArray:
        """Which of the pages have more than one reference, bool [n]."""
        shared = np.zeros(ids.size, dtype=np.bool_)
        for _, pool, of_pool in self._split(pools):
            shared[of_pool] = pool.references(ids[of_pool]) > 1
        return shared

    def copy(self, source: IntArray, target: IntArray, pools: IntArray) -> None:
        """Copy whole pages to other pages of the same formats."""
        self.copy_from(self, source, target, pools)

    def copy_from(self, other: Tier, source: IntArray, target: IntArray, pools: IntArray) -> None:
        """Copy whole pages of a tier whose pools have the same numbers; see PagePool.copy_from."""
        for i, pool, of_pool in self._split(pools):
            pool.copy_from(other.pools[i], source[of_pool], target[of_pool])

    def changing(self, ids: IntArray, pools: IntArray) -> None:
        """Note that pages are about to be other than they were; see PagePool.changing."""
        for _, pool, of_pool in self._split(pools):
            pool.changing(ids[of_pool])

    def move_tokens(
        self,
        source: tuple[IntArray, IntArray],
        target: tuple[IntArray, IntArray],
        pools: IntArray,
        *,
        at_once: bool = False,
    ) -> None:
        """Copy tokens, given by page ids and rows within the page; see PagePool.move_tokens."""
        for _, pool, of_pool in self._split(pools):
            pool.move_tokens(
                (source[0][of_pool], source[1][of_pool]),
                (target[0][of_pool], target[1][of_pool]),
                at_once=at_once,
            )

    def clear(self, ids: IntArray, pools: IntArray, names: Iterable[str]) -> None:
        """Set some fields of whole pages to zero."""
        for _, pool, of_pool in self._split(pools):
            pool.clear(ids[of_pool], names)

    def clear_from(
        self, ids: IntArray, first: IntArray, pools: IntArray, names: Iterable[str]
    ) -> None:
        """Set the rows from first[i] on to zero; see PagePool.clear_from."""
        for _, pool, of_pool in self._split(pools):
            pool.clear_from(ids[of_pool], first[of_pool], names)

    def clear_rows(
        self, ids: IntArray, rows: IntArray, pools: IntArray, names: Iterable[str]
    ) -> None:
        """Set row rows[i] of page ids[i] to zero; see PagePool.clear_rows."""
        for _, pool, of_pool in self._split(pools):
            pool.clear_rows(ids[of_pool], rows[of_pool], names)

    def bytes_of(self, pools: IntArray) -> int:
        """Bytes of one page of each of the pools."""
        counts = np.bincount(pools, minlength=len(self.pools)).tolist()
        return sum(n * pool.page_bytes for n, pool in zip(counts, self.pools, strict=True))

    def _split(self, pools: IntArray) -> Iterator[tuple[int, PagePool, Any]]:
        """The pools that occur, each with its number and an index of where it does."""
        present = np.flatnonzero(np.bincount(pools)).tolist()
        for i in present:
            yield i, self.pools[i], slice(None) if len(present) == 1 else pools == i
