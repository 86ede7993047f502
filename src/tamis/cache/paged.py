"""The cache of one model: all bytes, all pools, and the sequences that live in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tamis.cache.arena import Arena
from tamis.cache.copies import HostCopies
from tamis.cache.format import Field, PageFormat
from tamis.cache.layout import CacheLayout
from tamis.cache.pool import IntArray, PagePool
from tamis.cache.sequence import SequenceCache
from tamis.cache.tier import Tier
from tamis.cache.transfers import Transfers
from tamis.errors import ConfigError

_MOST_STAGED = 1 << 30


class PagedCache:
    """Owns the memory of both tiers, and the budget of host memory for swapping.

    Attributes:
        layout: the rows, and the formats of pages without side columns.
        device_tier: the memory that attention reads, with the live pages of all sequences.
        host_tier: host memory for stores; none unless asked for.
        copies: host memory for swapping.
        transfers: copies between the tiers that run beside the device's work; None where there is
            one memory, as on the CPU.
    """

    def __init__(
        self,
        layout: CacheLayout,
        capacity_bytes: int,
        device: torch.device | str = "cpu",
        swap_bytes: int = 0,
        host_bytes: int = 0,
        transfers: Transfers | None = None,
    ) -> None:
        """Reserve the memory.

        Args:
            layout: the rows.
            capacity_bytes: of the device's tier, on `device`.
            swap_bytes, host_bytes: of host memory for swapping, and for stores.
            transfers: by default those of a GPU; with swapping, they take a sixteenth of
                `capacity_bytes` more of its memory, at the most 1 GiB.

        Raises:
            ConfigError: a size is negative, or beyond what page ids can address.
        """
        for name, size in (("swap_bytes", swap_bytes), ("host_bytes", host_bytes)):
            if size < 0:
                raise ConfigError(f"{name} is {size}; it must be 0 or more")
        self.layout = layout
        self.device_tier = Tier(layout, capacity_bytes, device)
        device, on_gpu = torch.device(device), torch.device(device).type == "cuda"
        if transfers is None and on_gpu:
            least = 2 * self.arena.block_bytes
            staging = max(least, min(_MOST_STAGED, capacity_bytes // 16))
            transfers = Transfers(device, staging if swap_bytes else 0)
        self.transfers = transfers
        self.host_tier = Tier(layout, host_bytes, "cpu", pinned=on_gpu)
        swap_tier = Tier(layout, swap_bytes, "cpu", pinned=on_gpu)
        self.copies = HostCopies(self.device_tier, swap_tier, transfers)
        self._rows_with: dict[tuple[Field, ...], tuple[CacheLayout, IntArray]] = {}
        self.rows_with(layout.columns)

    @property
    def arena(self) -> Arena:
        """The device's bytes."""
        return self.device_tier.arena

    @property
    def pools(self) -> Sequence[PagePool]:
        """The device's pools: those of `layout.formats` in their order, then what came later."""
        return self.device_tier.pools

    @property
    def capacity_bytes(self) -> int:
        """Bytes that pages may take together on the device."""
        return self.arena.capacity_bytes

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the device's pages in use; a page that sequences share counts once."""
        return self.arena.bytes_in_use

    @property
    def host_bytes_in_use(self) -> int:
        """Bytes of the host tier's pages in use."""
        return self.host_tier.arena.bytes_in_use

    @property
    def swap_bytes(self) -> int:
        """Bytes of host memory for swapping."""
        return self.copies.host.arena.capacity_bytes

    @property
    def swap_bytes_in_use(self) -> int:
        """Bytes of it that swapped sequences and prefixes given up by the device take; copies of
        pages that are on the device too, which go when memory is needed, do not count."""
        return self.copies.needed_bytes

    @property
    def bytes_peak(self) -> int:
        """The most bytes that were in use at once on the device."""
        return self.arena.bytes_peak

    @property
    def free_bytes(self) -> int:
        """Bytes not in use on the device."""
        return self.capacity_bytes - self.bytes_in_use

    def arrive(self) -> None:
        """Have the device wait, from here on, for the pages that came `beside` its work
        (`SequenceCache.swap_in`)."""
        if self.transfers is not None:
            self.transfers.arrive()

    def tier(self, name: str) -> Tier:
        """The tier called "device" or "host".

        Raises:
            ConfigError: it is called something else.
        """
        tiers = {"device": self.device_tier, "host": self.host_tier}
        if name not in tiers:
            raise ConfigError(f"there is no memory tier {name!r}; it must be one of {[*tiers]}")
        return tiers[name]

    def pool(self, format: PageFormat, tier: str = "device") -> PagePool:
        """A format's pool, which is made when it is first asked for.

        Raises:
            ConfigError: a page of the format does not fit a block of the tier's memory.
        """
        of_tier = self.tier(tier)
        return of_tier.pools[of_tier.number(format)]

    def rows_with(self, columns: tuple[Field, ...]) -> tuple[CacheLayout, IntArray]:
        """The layout of sequences with these side columns, and each row's pool, int32 [rows].

        Raises:
            ConfigError: the columns' names clash, or a page with them does not fit a block.
        """
        if columns not in self._rows_with:
            layout = self.layout.with_columns(columns)
            numbers = [self.device_tier.number(format) for format in layout.formats]
            row_pools = np.array(numbers, dtype=np.int32)[layout.row_formats]
            self._rows_with[columns] = (layout, row_pools)
        return self._rows_with[columns]

    def new_sequence(self, columns: tuple[Field, ...] = ()) -> SequenceCache:
        """An empty sequence; it holds no page yet.

        Args:
            columns: fields that its live pages hold in every layer after keys, values and
                positions: a method's data per token, or per page where `Field.rows` says so.

        Raises:
            ConfigError: the columns' names clash, or a page with them does not fit a block.
        """
        return SequenceCache(self, columns)

    def fits(
        self, n_tokens: int, chunk: int | None = None, columns: tuple[Field, ...] = ()
    ) -> bool:
        """Whether a sequence of `n_tokens` tokens fits when it has the cache to itself.

        Args:
            n_tokens: tokens cached in the end, without eviction.
            chunk: the most tokens that are added at once; None if all of them may be.
            columns: the sequence's side columns.

        Raises:
            ConfigError: a page with the columns does not fit a block.
        """
        layout, _ = self.rows_with(columns)
        pages = layout.peak_pages(n_tokens, chunk)
        return layout.blocks(self.arena.block_bytes, pages) <= self.arena.n_blocks

    def required_bytes(
        self, n_tokens: int, chunk: int | None = None, columns: tuple[Field, ...] = ()
    ) -> int:
        """A capacity with which `fits` holds.

        Raises:
            ConfigError: no capacity would do, because a page with the columns is too large.
        """
        layout = self.layout.with_columns(columns)
        return layout.capacity_for(layout.peak_pages(n_tokens, chunk))

    def distinct_bytes(self, sequences: Sequence[SequenceCache]) -> int:
        """Bytes of the pages of some sequences on the device, each shared page counted once."""
        if len(sequences) == 1 and not sequences[0].swapped:
            return sequences[0].bytes
        ids, pools = map(np.concatenate, zip(*(s.held_pages() for s in sequences), strict=True))
        _, first = np.unique(ids, return_index=True)
        return self.device_tier.bytes_of(pools[first])
