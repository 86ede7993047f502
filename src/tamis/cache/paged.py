"""The cache of one model: all bytes, all pools, and the sequences that live in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tamis.cache.arena import Arena
from tamis.cache.layout import CacheLayout
from tamis.cache.pool import IntArray, OutOfPages, PagePool
from tamis.cache.sequence import SequenceCache
from tamis.errors import ConfigError


class PagedCache:
    """Owns the arena, one pool per page format, and the budget of host memory for swapping.

    Attributes:
        layout: the rows and formats.
        arena: the bytes.
        pools: one per format, in the order of `layout.formats`.
        swap_bytes: host memory that swapped sequences may take.
        swap_bytes_in_use: what they take now; kept by the sequences.
    """

    def __init__(
        self,
        layout: CacheLayout,
        capacity_bytes: int,
        device: torch.device | str = "cpu",
        swap_bytes: int = 0,
    ) -> None:
        """Reserve the memory.

        Raises:
            ConfigError: a size is negative, or `capacity_bytes` beyond what page ids can address.
        """
        if swap_bytes < 0:
            raise ConfigError(f"swap_bytes is {swap_bytes}; it must be 0 or more")
        self.layout = layout
        block_bytes = layout.block_bytes(capacity_bytes)
        self.arena = Arena(capacity_bytes, device, block_bytes=block_bytes)
        self.pools = tuple(PagePool(self.arena, format) for format in layout.formats)
        self.swap_bytes = swap_bytes
        self.swap_bytes_in_use = 0

    @property
    def capacity_bytes(self) -> int:
        """Bytes that pages may take together."""
        return self.arena.capacity_bytes

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages in use; a page that sequences share counts once."""
        return self.arena.bytes_in_use

    @property
    def bytes_peak(self) -> int:
        """The most bytes that were in use at once."""
        return self.arena.bytes_peak

    @property
    def free_bytes(self) -> int:
        """Bytes not in use."""
        return self.capacity_bytes - self.bytes_in_use

    def new_sequence(self) -> SequenceCache:
        """An empty sequence; it holds no page yet."""
        return SequenceCache(self)

    def fits(self, n_tokens: int, chunk: int | None = None) -> bool:
        """Whether a sequence of `n_tokens` tokens fits when it has the cache to itself.

        Args:
            n_tokens: tokens cached in the end, without eviction.
            chunk: the most tokens that are added at once; None if all of them may be.
        """
        pages = self.layout.peak_pages(n_tokens, chunk)
        return self.layout.blocks(self.arena.block_bytes, pages) <= self.arena.n_blocks

    def required_bytes(self, n_tokens: int, chunk: int | None = None) -> int:
        """A capacity with which `fits` holds."""
        return self.layout.capacity_for(self.layout.peak_pages(n_tokens, chunk))

    def distinct_bytes(self, sequences: Sequence[SequenceCache]) -> int:
        """Bytes of the pages of some sequences on the device, each shared page counted once."""
        if len(sequences) == 1 and not sequences[0].swapped:
            return sequences[0].bytes
        total = 0
        ids, formats = map(np.concatenate, zip(*(s.held_pages() for s in sequences), strict=True))
        for i, pool in enumerate(self.pools):
            total += np.unique(ids[formats == i]).size * pool.page_bytes
        return total

    def can_allocate(self, pages: IntArray) -> bool:
        """Whether so many pages of each format, int32 [formats], can be allocated together."""

        def blocks_short() -> int:
            return sum(pool.blocks_short(int(n)) for pool, n in zip(self.pools, pages, strict=True))

        if blocks_short() <= self.arena.free_blocks:
            return True
        self.arena.reclaim()
        return blocks_short() <= self.arena.free_blocks

    def allocate(self, formats: IntArray) -> IntArray:
        """Take one page of each of the formats, int32 [n]: their ids, int32 [n].

        Raises:
            OutOfPages: they do not all fit; none was taken.
        """
        counts = np.bincount(formats, minlength=len(self.pools)).astype(np.int32)
        if not self.can_allocate(counts):
            free = [pool.free_pages for pool in self.pools]
            raise OutOfPages(f"{counts.tolist()} pages wanted, {free} free")
        ids = np.empty(formats.size, dtype=np.int32)
        for i, pool in enumerate(self.pools):
            ids[formats == i] = pool.allocate(int(counts[i]))
        return ids

    def retain(self, ids: IntArray, formats: IntArray) -> None:
        """Add one reference to each of the pages, given with their formats."""
        for i, pool in enumerate(self.pools):
            pool.retain(ids[formats == i])

    def release(self, ids: IntArray, formats: IntArray) -> None:
        """Drop one reference of each of the pages, given with their formats."""
        for i, pool in enumerate(self.pools):
            pool.release(ids[formats == i])

    def shared(
        self, ids: IntArray, formats: IntArray
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which of the pages have more than one reference, bool [n]."""
        shared = np.zeros(ids.size, dtype=np.bool_)
        for i, pool in enumerate(self.pools):
            of_format = formats == i
            shared[of_format] = pool.references(ids[of_format]) > 1
        return shared

    def copy(self, source: IntArray, target: IntArray, formats: IntArray) -> None:
        """Copy whole pages to other pages of the same formats."""
        for i, pool in enumerate(self.pools):
            pool.copy(source[formats == i], target[formats == i])

    def read(self, ids: IntArray, formats: IntArray) -> list[torch.Tensor]:
        """A copy of whole pages in host memory: per format, opaque words in the order of `ids`."""
        return [pool.read(ids[formats == i]) for i, pool in enumerate(self.pools)]

    def write(self, ids: IntArray, formats: IntArray, words: list[torch.Tensor]) -> None:
        """Put back what `read` gave into other pages of the same formats."""
        for i, pool in enumerate(self.pools):
            pool.write(ids[formats == i], words[i])
