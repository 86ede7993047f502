"""Copies of device pages in host memory, kept for as long as they are good and there is room."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from tamis.cache.pool import BoolArray, IntArray, OutOfPages, PagePool
from tamis.cache.tier import Tier
from tamis.cache.transfers import Transfers


class OutOfSwap(Exception):  # noqa: N818 - an event for the scheduler, not a failure
    """The host memory for swapping is full; nothing was changed.

    Attributes:
        missing: bytes that must be given up, at the least, before it could fit.
    """

    def __init__(self, n_bytes: int, free: int) -> None:
        super().__init__(f"{n_bytes} bytes to swap out, {free} bytes of host memory free")
        self.missing = max(1, n_bytes - free)


class PoolCopies:
    """Which pages of one pool have a copy in a pool of host memory.

    A page and its copy are *linked* while they are the same, byte for byte: the device's pool
    tells when a page is about to be written or is freed, and the link is gone. A link is one
    reference of the copy. Several pages may be linked to one copy.

    Attributes:
        n_linked: pages that have a copy.
    """

    def __init__(self, pool: PagePool, host: PagePool, transfers: Transfers | None) -> None:
        self.pool = pool
        self.host = host
        self.n_linked = 0
        self._transfers = transfers
        self._copy = np.full(pool.n_slots, -1, dtype=np.int32)  # by slot; -1 for none
        self._since = np.zeros(pool.n_slots, dtype=np.int64)
        self._ticks = itertools.count(1)
        pool.watch(self)

    @property
    def spare_bytes(self) -> int:
        """Bytes of the copies that nobody needs but for their links."""
        slots = self._spare()
        return np.unique(self._copy[slots]).size * self.host.page_bytes

    def of(self, ids: IntArray) -> IntArray:
        """The copy of each page, int32 [n]; -1 for none."""
        copies: IntArray = self._copy[self.pool.slots(ids)]
        return copies

    def link(self, ids: IntArray, copies: IntArray) -> None:
        """Note that pages, which have no copy, are the same as pages of host memory."""
        if not ids.size:
            return
        slots = self.pool.slots(ids)
        self.host.retain(copies)
        self._copy[slots] = copies
        self._since[slots] = next(self._ticks)
        self.n_linked += ids.size

    def changing(self, slots: IntArray) -> None:
        """Forget the copies of pages that are about to be other than they were; what is under way
        to them comes first."""
        if self._transfers is not None:
            self._transfers.arrive()
        if self.n_linked:
            self._unlink(np.unique(slots[self._copy[slots] >= 0]))

    def give_up(self, n_bytes: int) -> bool:
        """Free about so many bytes of copies that nobody needs, the oldest first; whether there
        were any."""
        slots = self._spare()
        oldest = slots[np.argsort(self._since[slots], kind="stable")]
        self._unlink(oldest[: -(-n_bytes // self.host.page_bytes)])
        return slots.size > 0

    def _spare(self) -> IntArray:
        """The pages whose copies have no references but those of their links."""
        if not self.n_linked:
            return np.zeros(0, dtype=np.int32)
        slots = np.flatnonzero(self._copy >= 0).astype(np.int32)
        copies = self._copy[slots]
        _, place, links = np.unique(copies, return_inverse=True, return_counts=True)
        spare: IntArray = slots[links[place] == self.host.references(copies)]
        return spare

    def _unlink(self, slots: IntArray) -> None:
        """Take back the links of distinct pages that are linked."""
        self.host.release(self._copy[slots])
        self._copy[slots] = -1
        self.n_linked -= slots.size


class HostCopies:
    """The host memory for swapping.

    Whoever gives device pages up `hold`s them here first, and later either `restore`s or `drop`s
    them. A copy outlives that: while its page is on the device and unchanged it stays, *spare*, so
    that the page can be given up again without being copied (the KV cache reuse of FastSwitch,
    arXiv:2411.18424). Spare copies are the first to go when memory is needed, and count as free.

    Where there is one memory, all pages of a sequence are moved at once, wherever they lie, before
    anything else goes on. Two other devices of the paper gained nothing on a CPU of two cores,
    where 8k tokens of a small model (34 MB) take 2.6 ms to copy: contiguous groups of pages,
    because scattered ones move at four fifths of their speed; and a thread that copies while the
    model runs, because a step and a copy took as long together as one after the other. Between a
    GPU and the host, copies run beside its work (`Transfers`).

    Operations take page ids with the numbers of their pools, int32 [n] each.

    Attributes:
        host: the memory, with the pools of the device's tier under their numbers there.
        copied_bytes: how much has been copied to it so far.
    """

    def __init__(self, device: Tier, host: Tier, transfers: Transfers | None = None) -> None:
        self.host = host
        self.copied_bytes = 0
        self._transfers = transfers
        self._device = device
        self._pools: list[PoolCopies] = []

    @property
    def spare_bytes(self) -> int:
        """Bytes of copies that could go at once: their pages are on the device too."""
        return sum(pool.spare_bytes for pool in self._pools)

    @property
    def needed_bytes(self) -> int:
        """Bytes of all other copies."""
        return self.host.arena.bytes_in_use - self.spare_bytes

    def hold(self, ids: IntArray, pools: IntArray, final: BoolArray) -> IntArray:
        """Copy distinct pages to host memory, where this is not done yet, until `drop`.

        Args:
            ids, pools: the pages.
            final: which of them are full, so that their copies stay good as long as nobody writes
                to them; the others' copies are for this time only, bool [n].

        Returns:
            Their copies, int32 [n].

        Raises:
            OutOfSwap: they do not fit, even if all spare copies went; nothing was changed.
        """
        self._match_pools()
        copies = np.empty_like(ids)
        for of_pool, pool in self._split(pools):
            copies[of_pool] = pool.of(ids[of_pool])
        there = copies >= 0
        self.host.retain(copies[there], pools[there])
        try:
            copies[~there] = self._allocate(pools[~there])
        except OutOfSwap:
            self.host.release(copies[there], pools[there])
            raise
        if self._transfers is None:
            self.host.copy_from(self._device, ids[~there], copies[~there], pools[~there])
        else:
            for of_pool, pool in self._split(pools):
                new = of_pool & ~there
                self._transfers.send(pool.pool, ids[new], pool.host, copies[new])
        self.copied_bytes += self.host.bytes_of(pools[~there])
        self._link(ids, copies, pools, final & ~there)
        return copies

    def restore(
        self,
        copies: IntArray,
        pools: IntArray,
        final: BoolArray,
        ids: IntArray,
        *,
        beside: bool = False,
    ) -> None:
        """Fill fresh device pages with what was held, which is held no more.

        Args:
            copies, pools, final: as `hold` returned and took them.
            ids: the pages, int32 [n].
            beside: see `SequenceCache.swap_in`.
        """
        if self._transfers is None:
            self._device.copy_from(self.host, copies, ids, pools)
        else:
            for of_pool, pool in self._split(pools):
                self._transfers.bring(pool.host, copies[of_pool], pool.pool, ids[of_pool])
            if not beside:
                self._transfers.arrive()
        self._link(ids, copies, pools, final)
        self.drop(copies, pools)

    def drop(self, copies: IntArray, pools: IntArray) -> None:
        """Take back a `hold`."""
        self.host.release(copies, pools)

    def clear(self) -> None:
        """Give up all spare copies."""
        for pool in self._pools:
            pool.give_up(pool.host.bytes_in_use)

    def _link(self, ids: IntArray, copies: IntArray, pools: IntArray, which: BoolArray) -> None:
        for of_pool, pool in self._split(pools):
            chosen = which[of_pool]
            pool.link(ids[of_pool][chosen], copies[of_pool][chosen])

    def _allocate(self, pools: IntArray) -> IntArray:
        """Pages of host memory, spare copies being given up for them."""
        arena, n_bytes = self.host.arena, self.host.bytes_of(pools)
        while True:
            try:
                return self.host.allocate(pools)
            except OutOfPages:
                free = arena.capacity_bytes - self.needed_bytes
                short = n_bytes - (arena.capacity_bytes - arena.bytes_in_use)
                # A block at least: other formats' pages only make room by whole blocks.
                short = max(short, arena.block_bytes)
                if n_bytes > free or not any(pool.give_up(short) for pool in self._pools):
                    raise OutOfSwap(n_bytes, free) from None

    def _match_pools(self) -> None:
        """Have a pool of host memory for each of the device's."""
        for pool in self._device.pools[len(self._pools) :]:
            host = self.host.add_pool(pool.format)
            self._pools.append(PoolCopies(pool, host, self._transfers))

    def _split(self, pools: IntArray) -> Iterator[tuple[BoolArray, PoolCopies]]:
        """The pools that occur, with where they do."""
        return ((pools == i, self._pools[i]) for i in np.unique(pools).tolist())
