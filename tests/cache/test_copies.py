"""What has been copied to host memory once is copied again only where it has changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tamis.cache import (
    BatchView,
    CacheLayout,
    Field,
    LayerShape,
    OutOfSwap,
    PagedCache,
    PageFormat,
    SequenceCache,
)
from tests.cache import tokens

LAYOUT = CacheLayout((LayerShape(2, 8, 8), LayerShape(1, 8, 8)), 4, torch.float32)
ROWS = 3
PAGE_BYTES = 320
COLUMNS = (Field("score", torch.float32, 1), Field("bound", torch.float32, 2, rows=1))
STORED = PageFormat.dense(8, 8, 8, torch.float32)


def make_cache(capacity: int = 60_000, swap_bytes: int = 60_000) -> PagedCache:
    return PagedCache(LAYOUT, capacity, swap_bytes=swap_bytes)


def grown(cache: PagedCache, n: int, columns: tuple[Field, ...] = ()) -> SequenceCache:
    sequence = cache.new_sequence(columns)
    tokens.grow(sequence, range(n))
    return sequence


def out_and_in(sequence: SequenceCache) -> int:
    """Pages that a swap out and in copies to host memory, after which others lie on the device."""
    cache = sequence.cache
    before = cache.copies.copied_bytes
    sequence.swap_out()
    copied = cache.copies.copied_bytes - before
    other = cache.new_sequence()
    tokens.grow(other, range(900, 940))
    sequence.swap_in()
    other.free()
    return copied // cache.pools[int(sequence.row_pools[0])].page_bytes


def contents(sequence: SequenceCache) -> list[torch.Tensor]:
    names = ("k", "v", "position", *(field.name for field in sequence.layout.columns[:1]))
    return [sequence.column(layer, name) for layer in range(2) for name in names]


def test_only_new_pages_and_the_partly_filled_ones_are_copied_again() -> None:
    sequence = grown(make_cache(), 18)  # four full pages and one of two tokens in every row
    assert [out_and_in(sequence) for _ in range(3)] == [5 * ROWS, ROWS, ROWS]
    tokens.grow(sequence, range(18, 25))  # the fifth page and a sixth are full, one has a token
    assert [out_and_in(sequence) for _ in range(2)] == [3 * ROWS, ROWS]
    tokens.grow(sequence, range(25, 28))
    assert [out_and_in(sequence) for _ in range(2)] == [ROWS, 0]
    assert sequence.contents(0, 1, "k").equal(tokens.keys(range(28), 1, 8))


def write(sequence: SequenceCache) -> None:
    sequence.write(1, [np.array([5])], v=[torch.ones(1, 8)])


def keep(sequence: SequenceCache) -> None:
    sequence.keep(1, [np.array([0, 1, 2, 3, 4, 6, 7, 8, 9])])


def take_out(sequence: SequenceCache) -> None:
    sequence.take_out(1, np.array([5]))


def put_in_order(sequence: SequenceCache) -> None:
    sequence.take_out(1, np.array([1]))
    sequence.pages(1)


def retract(sequence: SequenceCache) -> None:
    sequence.retract(6, [])
    tokens.grow(sequence, range(50, 56))


def shorten(sequence: SequenceCache) -> None:
    sequence.keep(1, [np.arange(6)])
    tokens.grow(sequence, [60, 61])  # fills the page again, and begins one in the other two rows


def lengthen_a_fork(sequence: SequenceCache) -> None:
    branch = sequence.fork()
    sequence.retract(6, [])
    branch.free()
    tokens.grow(sequence, range(50, 56))


def score(sequence: SequenceCache) -> None:
    sequence.accumulate(1, "score", torch.ones(1, 16))


def set_score(sequence: SequenceCache) -> None:
    sequence.set_column(1, "score", torch.ones(1, 16, 1))


def summarize(sequence: SequenceCache) -> None:
    sequence.set_summaries(1, "bound", 2, torch.ones(1, 2, 1, 2))


def write_in_place(sequence: SequenceCache) -> None:
    at = torch.tensor([2, 9], dtype=torch.int32)
    batch = BatchView(sequence.cache, [sequence], [2], at, in_place=[True])
    batch.append(1, torch.ones(2, 1, 8), torch.ones(2, 1, 8))


def drop_front(sequence: SequenceCache) -> None:
    sequence.drop_front(1, np.array([2]))


@pytest.mark.parametrize(
    ("change", "pages"),
    [
        (write, 1),
        (keep, 2),
        (take_out, 2),
        (put_in_order, 4),
        (retract, 2 * ROWS),
        (shorten, 1 + 2),
        (lengthen_a_fork, 2 * ROWS),
        (score, 4),
        (set_score, 4),
        (summarize, 2),
        (write_in_place, 4 * ROWS),
        (drop_front, 0),
    ],
)
def test_pages_that_were_written_are_copied_again_and_no_others(
    change: Callable[[SequenceCache], None], pages: int
) -> None:
    """Of four full pages in each of the three rows; most of the changes are to layer 1, one row."""
    sequence = grown(make_cache(), 16, COLUMNS)
    assert [out_and_in(sequence) for _ in range(2)] == [4 * ROWS, 0]
    change(sequence)
    expected = contents(sequence)
    assert out_and_in(sequence) == pages
    for mine, one in zip(contents(sequence), expected, strict=True):
        assert torch.equal(mine, one)


@pytest.mark.parametrize("change", [write, keep, take_out, retract, shorten, lengthen_a_fork])
def test_pages_without_columns_come_back_as_they_were_written(
    change: Callable[[SequenceCache], None],
) -> None:
    sequence = grown(make_cache(), 16)
    out_and_in(sequence)
    change(sequence)
    expected = contents(sequence)
    out_and_in(sequence)
    for mine, one in zip(contents(sequence), expected, strict=True):
        assert torch.equal(mine, one)


def test_pages_of_stores_are_copied_once() -> None:
    sequence = grown(make_cache(), 8)
    sequence.add_store("s", {0: STORED}, "device")
    sequence.put("s", (0,), 20, tokens.stored(range(20), 2))
    out_and_in(sequence)
    before = sequence.cache.copies.copied_bytes
    for _ in range(2):
        out_and_in(sequence)
        assert sequence.stored("s", 0)["k"].equal(tokens.stored(range(20), 2)["k"])
    assert sequence.cache.copies.copied_bytes == before


def test_branches_share_copies_until_one_of_them_writes() -> None:
    cache = make_cache()
    sequence = grown(cache, 16)
    branch = sequence.fork()
    sequence.swap_out()
    held = cache.swap_bytes_in_use
    branch.swap_out()
    assert cache.swap_bytes_in_use == held == cache.copies.copied_bytes
    sequence.swap_in()
    branch.swap_in()
    write(branch)
    assert out_and_in(sequence) == 0
    assert out_and_in(branch) == 1
    assert sequence.contents(1, 0, "v").equal(tokens.values(range(16), 2, 8))


def test_copies_of_pages_on_the_device_are_in_nobodys_way() -> None:
    """Host memory for one sequence, taken in turns by three."""
    swap_bytes = LAYOUT.capacity_for(LAYOUT.peak_pages(16))
    cache = make_cache(swap_bytes=swap_bytes)
    sequences = [grown(cache, 16) for _ in range(3)]
    for _ in range(2):
        for sequence in sequences:
            assert out_and_in(sequence) == 4 * ROWS
            assert cache.swap_bytes_in_use == 0
            assert cache.copies.spare_bytes == 4 * ROWS * PAGE_BYTES
            assert cache.copies.host.arena.bytes_in_use <= swap_bytes
            assert sequence.contents(0, 1, "k").equal(tokens.keys(range(16), 1, 8))


def test_the_oldest_spare_copies_go_first() -> None:
    cache = make_cache(swap_bytes=LAYOUT.capacity_for(2 * LAYOUT.peak_pages(16)))
    first, second, third = (grown(cache, 16) for _ in range(3))
    assert [out_and_in(s) for s in (first, second, first)] == [12, 12, 0]
    assert out_and_in(third) == 12
    assert out_and_in(first) == 0
    assert out_and_in(second) == 12


def test_what_cannot_fit_takes_no_copies_from_others() -> None:
    cache = make_cache(swap_bytes=LAYOUT.capacity_for(LAYOUT.peak_pages(16)))
    sequence, large = grown(cache, 16), grown(cache, 40)
    out_and_in(sequence)
    with pytest.raises(OutOfSwap) as raised:
        large.swap_out()
    assert raised.value.missing == 30 * PAGE_BYTES - cache.swap_bytes
    assert out_and_in(sequence) == 0


def test_copies_end_with_their_pages() -> None:
    cache = make_cache()
    sequence = grown(cache, 18)
    out_and_in(sequence)
    assert cache.copies.spare_bytes == 4 * ROWS * PAGE_BYTES
    sequence.drop_front(0, np.array([1, 3]))
    assert cache.copies.spare_bytes == 8 * PAGE_BYTES
    sequence.free()
    assert cache.copies.host.arena.bytes_in_use == 0
