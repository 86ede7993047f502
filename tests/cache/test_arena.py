"""The arena hands out aligned blocks, and gets them back when another pool needs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.cache import Arena, OutOfPages, PageFormat, PagePool
from tamis.cache.arena import MAX_BYTES
from tamis.errors import ConfigError


def test_bytes_are_aligned_and_begin_their_storage() -> None:
    for _ in range(5):
        arena = Arena(1000, block_bytes=64)
        assert arena.data.data_ptr() % 64 == 0
        assert arena.data.storage_offset() == 0
        assert arena.data.dtype == torch.uint8


def test_capacity_is_whole_blocks() -> None:
    arena = Arena(1000, block_bytes=192)
    assert arena.n_blocks == 5
    assert arena.capacity_bytes == arena.data.numel() == 960


@pytest.mark.parametrize("capacity", [-1, MAX_BYTES + 1])
def test_a_capacity_that_page_ids_cannot_address_is_refused(capacity: int) -> None:
    with pytest.raises(ConfigError, match=f"{capacity} bytes.*between 0 and 128 GiB"):
        Arena(capacity, block_bytes=1 << 20)


@pytest.mark.parametrize("block_bytes", [0, 63, 100])
def test_blocks_are_multiples_of_the_unit(block_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"block_bytes is {block_bytes}"):
        Arena(1000, block_bytes=block_bytes)


def test_page_ids_reach_the_end_of_the_largest_arena() -> None:
    arena = Arena(MAX_BYTES, "meta", block_bytes=1 << 30)  # sizes and ids, without the bytes
    pool = PagePool(arena, PageFormat.dense(256, 256, 256, torch.float32))
    ids = pool.allocate(pool.free_pages)
    assert ids.dtype == np.int32
    assert ids.min() == 0
    assert MAX_BYTES - (1 << 21) < int(ids.max()) * 64 + pool.page_bytes <= MAX_BYTES
    pool.release(ids)
    assert pool.bytes_in_use == 0


def test_empty_blocks_move_between_formats() -> None:
    arena = Arena(8 * 1024, block_bytes=1024)
    narrow = PagePool(arena, PageFormat.dense(4, 4, 4, torch.float32))  # 192 bytes, 5 a block
    wide = PagePool(arena, PageFormat.dense(4, 16, 12, torch.float32))  # 512 bytes, 2 a block
    ids = narrow.allocate(40)
    assert wide.free_pages == 0
    with pytest.raises(OutOfPages):
        wide.allocate(1)

    narrow.release(ids[:13])  # two blocks and three fifths of a third
    assert wide.free_pages == 4
    taken = wide.allocate(4)
    assert narrow.free_pages == 3
    # The bytes do not overlap with pages still in use.
    used = {unit for id in ids[13:].tolist() for unit in range(id, id + 3)}
    assert not used & {unit for id in taken.tolist() for unit in range(id, id + 8)}

    wide.release(taken)
    narrow.release(ids[13:])
    assert narrow.free_pages == 40
    assert wide.free_pages == 16


def test_the_peak_is_of_all_pools_together() -> None:
    arena = Arena(4 * 1024, block_bytes=1024)
    narrow = PagePool(arena, PageFormat.dense(4, 4, 4, torch.float32))
    wide = PagePool(arena, PageFormat.dense(4, 16, 12, torch.float32))
    first = narrow.allocate(5)
    narrow.release(first)
    wide.allocate(3)
    narrow.allocate(2)
    assert arena.bytes_in_use == 2 * 192 + 3 * 512
    assert arena.bytes_peak == arena.bytes_in_use
    assert narrow.bytes_peak == 5 * 192
    assert wide.bytes_peak == 3 * 512


def test_taking_more_blocks_than_are_free_is_a_bug_of_the_caller() -> None:
    arena = Arena(1024, block_bytes=512)
    with pytest.raises(AssertionError, match="3 blocks taken of 2"):
        arena.take(3)


class Runtime:
    """In place of CUDA's, which this machine need not have."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:  # noqa: N802
        if not self.error:
            self.pinned[address] = n_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.pinned[address]


class TestPinned:
    @pytest.fixture
    def runtime(self, monkeypatch: pytest.MonkeyPatch) -> Runtime:
        runtime = Runtime()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return runtime

    def test_memory_is_pinned_when_the_first_block_is_taken_and_until_it_is_freed(
        self, runtime: Runtime
    ) -> None:
        arena = Arena(1000, block_bytes=64, pinned=True)
        assert not runtime.pinned
        for _ in range(2):
            arena.take(1)
            ((address, n_bytes),) = runtime.pinned.items()
            begin = arena.data.data_ptr() - address
            assert 0 <= begin <= n_bytes - arena.capacity_bytes
        pages = arena.data[:64]
        del arena
        assert runtime.pinned
        del pages
        assert not runtime.pinned

    def test_what_is_not_to_be_pinned_is_not(self, runtime: Runtime) -> None:
        Arena(1000, block_bytes=64).take(1)
        assert not runtime.pinned

    def test_a_system_that_does_not_allow_it_is_an_error(self, runtime: Runtime) -> None:
        runtime.error = 2
        arena = Arena(1000, block_bytes=64, pinned=True)
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"could not be pinned \(2\); give swap_memory"):
                arena.take(1)
        assert arena.free_blocks == arena.n_blocks
