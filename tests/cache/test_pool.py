"""Pages are allocated all or nothing, counted by reference, accounted to the byte."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tamis.cache import Arena, OutOfPages, PageError, PageFormat, PagePool
from tamis.cache import pool as pool_module

FORMAT = PageFormat.dense(4, 8, 6, torch.float32)  # 128 + 128 + 64 bytes


@pytest.fixture
def pool() -> PagePool:
    """Twelve pages in four blocks."""
    return PagePool(Arena(4 * 1024, block_bytes=1024), FORMAT)


def test_pages_are_distinct_and_within_the_arena(pool: PagePool) -> None:
    ids = pool.allocate(12)
    offsets = np.sort(ids.astype(np.int64) * 64)
    assert ids.dtype == np.int32
    assert (np.diff(offsets) >= FORMAT.page_bytes).all()
    assert offsets[-1] + FORMAT.page_bytes <= pool.arena.capacity_bytes


def test_fresh_pages_ascend(pool: PagePool) -> None:
    ids = np.concatenate([pool.allocate(2), pool.allocate(7)])
    assert (np.diff(ids) > 0).all()


def test_allocation_is_all_or_nothing(pool: PagePool) -> None:
    pool.allocate(9)
    with pytest.raises(OutOfPages, match="4 pages wanted, 3 free"):
        pool.allocate(4)
    assert pool.free_pages == 3
    assert pool.bytes_in_use == 9 * 320
    pool.allocate(3)
    assert pool.free_pages == 0


def test_bytes_in_use_and_peak_are_exact(pool: PagePool) -> None:
    ids = pool.allocate(5)
    pool.release(ids[:2])
    assert (pool.bytes_in_use, pool.bytes_peak) == (3 * 320, 5 * 320)
    assert (pool.arena.bytes_in_use, pool.arena.bytes_peak) == (3 * 320, 5 * 320)


def test_a_page_is_free_when_its_last_reference_goes(pool: PagePool) -> None:
    ids = pool.allocate(2)
    pool.retain(ids)
    pool.retain(ids[:1])
    assert pool.references(ids).tolist() == [3, 2]
    pool.release(ids)
    assert pool.references(ids).tolist() == [2, 1]
    pool.release(ids)
    assert pool.references(ids[:1]).tolist() == [1]
    assert pool.bytes_in_use == 320
    pool.release(ids[:1])
    assert pool.bytes_in_use == 0


def test_one_call_may_name_a_page_twice(pool: PagePool) -> None:
    ids = pool.allocate(1)
    pool.retain(np.repeat(ids, 3))
    assert pool.references(ids).tolist() == [4]
    pool.release(np.repeat(ids, 4))
    assert pool.free_pages == 12
    assert len(set(pool.allocate(12).tolist())) == 12


def test_the_page_freed_last_is_used_first(pool: PagePool) -> None:
    ids = pool.allocate(6)
    pool.release(ids[2:3])
    pool.release(ids[4:5])
    assert pool.allocate(2).tolist() == [ids[4], ids[2]]


def test_freed_pages_are_used_before_new_blocks(pool: PagePool) -> None:
    ids = pool.allocate(3)  # a whole block
    pool.release(ids[:1])
    assert ids[0] in pool.allocate(2)


def test_freeing_twice_is_detected_and_changes_nothing(pool: PagePool) -> None:
    ids = pool.allocate(3)
    pool.release(ids[:1])
    for wrong in (ids, ids[:1], ids[[1, 1]]):
        with pytest.raises(PageError):
            pool.release(wrong)
    assert pool.references(ids[1:]).tolist() == [1, 1]
    assert pool.bytes_in_use == 2 * 320


@pytest.mark.parametrize("id", [-5, 1, 15, 64, 10_000])
def test_ids_that_name_no_page_are_detected(pool: PagePool, id: int) -> None:
    pool.allocate(12)  # 0, 5, 10 in the first block; 15 lies in the rest of it, 64 after the last
    wrong = np.array([id], dtype=np.int32)
    for operation in (pool.retain, pool.release, pool.references):
        with pytest.raises(PageError):
            operation(wrong)


def test_ids_of_free_pages_are_detected(pool: PagePool) -> None:
    ids = pool.allocate(2)
    pool.release(ids[1:])
    for operation in (pool.retain, pool.release, pool.references):
        with pytest.raises(PageError):
            operation(ids)
    assert pool.references(ids[:1]).tolist() == [1]


def test_no_pages_are_an_allocation_too(pool: PagePool) -> None:
    none = pool.allocate(0)
    pool.retain(none)
    pool.release(none)
    assert none.dtype == np.int32
    assert none.size == 0


def test_a_page_larger_than_a_block_is_out_of_pages() -> None:
    pool = PagePool(Arena(1024, block_bytes=256), FORMAT)
    assert pool.free_pages == 0
    with pytest.raises(OutOfPages):
        pool.allocate(1)


def test_fields_of_different_pages_do_not_overlap(pool: PagePool) -> None:
    ids = torch.from_numpy(pool.allocate(12).astype(np.int64))
    for i, name in enumerate(("k", "v", "position")):
        rows = torch.arange(12 * 4).reshape(12, 4, 1) * 10 + i
        pool.view(name)[ids] = rows.to(FORMAT.field(name).dtype)
    for i, name in enumerate(("k", "v", "position")):
        rows = torch.arange(12 * 4).reshape(12, 4, 1) * 10 + i
        assert (pool.view(name)[ids] == rows).all()


def test_pages_are_read_and_copied_in_pieces(
    pool: PagePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMIS_BACKEND", "reference")  # the kernel needs no pieces
    ids = pool.allocate(5)
    pool.arena.data.random_(generator=torch.Generator().manual_seed(0))
    whole = pool.read(ids)
    monkeypatch.setattr(pool_module, "_PIECE_BYTES", 2 * 320)
    assert torch.equal(pool.read(ids), whole)
    monkeypatch.setattr(pool_module, "_CACHED_BYTES", 2 * 320)
    elsewhere = PagePool(Arena(8_192, block_bytes=1_024), pool.format)
    others = elsewhere.allocate(7)[[6, 0, 3, 2, 5]]
    elsewhere.copy_from(pool, ids, others)
    assert torch.equal(elsewhere.read(others), whole)
    more = pool.allocate(2)
    pool.copy(ids[[3, 1]], more)
    assert torch.equal(pool.read(more), whole[[3, 1]])


class Notes:
    """What a pool says of its pages."""

    def __init__(self, pool: PagePool) -> None:
        self.slots: set[int] = set()
        pool.watch(self)

    def changing(self, slots: np.ndarray) -> None:
        self.slots |= set(slots.tolist())


@pytest.mark.parametrize(
    "change",
    [
        lambda pool, a, b: pool.scatter(a, "k", pool.gather(a, "k")),
        lambda pool, a, b: pool.scatter_rows(a, np.int32([1]), "k", pool.gather(a, "k")[:, 1]),
        lambda pool, a, b: pool.clear(a, ["k"]),
        lambda pool, a, b: pool.clear_from(a, np.int32([2]), ["k"]),
        lambda pool, a, b: pool.clear_rows(a, np.int32([2]), ["k"]),
        lambda pool, a, b: pool.copy(b, a),
        lambda pool, a, b: pool.move_tokens((b, np.int32([0])), (a, np.int32([0]))),
        lambda pool, a, b: pool.move_tokens((a, np.int32([0])), (b, np.int32([0]))),
        lambda pool, a, b: pool.release(a),
    ],
)
def test_whoever_watches_hears_of_every_page_that_changes(
    pool: PagePool, change: Callable[[PagePool, np.ndarray, np.ndarray], None]
) -> None:
    a, b, _ = np.split(pool.allocate(3), 3)
    pool.retain(b)
    mine, notes = pool.slots(a), Notes(pool)
    pool.read(a), pool.gather(a, "k"), pool.retain(b), pool.release(b)
    assert not notes.slots
    change(pool, a, b)
    assert set(mine.tolist()) <= notes.slots


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moves_towards_the_front_may_overlap(
    piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMIS_BACKEND", "reference")  # tests/cache/test_moves.py has the kernel's
    monkeypatch.setattr(pool_module, "_PIECE_TOKENS", piece)
    pool = PagePool(Arena(8 * 1024, block_bytes=1024), PageFormat.dense(4, 3, 5, dtype))
    ids = pool.allocate(3)
    before = {}
    for field in pool.format.fields:
        rows = torch.arange(12 * field.width).reshape(3, 4, field.width).to(field.dtype)
        pool.view(field.name)[torch.from_numpy(ids.astype(np.int64))] = rows
        before[field.name] = rows.flatten(0, 1)
    source = np.array([1, 2, 5, 6, 7, 10, 11], dtype=np.int32)
    target = np.arange(7, dtype=np.int32)
    pool.move_tokens((ids[source // 4], source % 4), (ids[target // 4], target % 4))
    for name, rows in before.items():
        assert torch.equal(pool.gather(ids, name).flatten(0, 1)[:7], rows[source])
        assert torch.equal(pool.gather(ids, name).flatten(0, 1)[7:], rows[7:])
