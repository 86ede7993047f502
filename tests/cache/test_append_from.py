"""Tokens are copied from one sequence behind those of another, and written where they lie."""

from __future__ import annotations

import pytest
import torch

from tamis.cache import BatchView, CacheLayout, Field, LayerShape, OutOfPages, PagedCache
from tests.cache import tokens

LAYOUT = CacheLayout((LayerShape(2, 8, 8), LayerShape(1, 4, 6, window=5)), 4, torch.float32)


def unturned(layer: int, k: torch.Tensor) -> torch.Tensor:
    return k


@pytest.fixture
def cache() -> PagedCache:
    return PagedCache(LAYOUT, 60_000)


@pytest.mark.parametrize("before", [0, 3, 8])
@pytest.mark.parametrize("columns", [(), (Field("seen", torch.float32, 1),)])
def test_a_copy_follows_with_its_positions_moved(
    cache: PagedCache, before: int, columns: tuple[Field, ...]
) -> None:
    one, other = cache.new_sequence(columns), cache.new_sequence()
    if before:
        tokens.grow(one, range(before))
    tokens.grow(other, range(100, 117))
    one.append_from(other, lambda layer, k: k + layer + 1)
    assert one.next_position == before + 17
    assert one.positions(0, 1).tolist() == list(range(before + 17))
    k, v = one.keys_values(0)
    torch.testing.assert_close(k[1, before:], tokens.keys(range(100, 117), 1, 8) + 1)
    torch.testing.assert_close(v[1, before:], tokens.values(range(100, 117), 1, 8))
    kept = other.positions(1, 0)  # what the window has left of it
    assert len(kept) < 17
    assert one.positions(1, 0)[-len(kept) :].tolist() == (kept + before).tolist()
    if columns:
        assert not one.column(0, "seen").any()
    assert other.positions(0, 0).tolist() == list(range(17))


def test_a_copy_that_finds_no_room_can_be_tried_again(cache: PagedCache) -> None:
    other, hog = cache.new_sequence(), cache.new_sequence()
    tokens.grow(other, range(40))
    one = cache.new_sequence()
    hog.reserve(1)
    while True:
        try:
            hog.reserve(hog.room + 4)
        except OutOfPages:
            break
    with pytest.raises(OutOfPages):
        one.append_from(other, unturned)
    assert one.next_position == 0
    assert not one.lengths.any()
    hog.free()
    one.append_from(other, unturned)
    assert one.positions(0, 0).tolist() == list(range(40))


def test_a_fork_is_left_as_it_is(cache: PagedCache) -> None:
    first, other = cache.new_sequence(), cache.new_sequence()
    tokens.grow(first, range(6))
    tokens.grow(other, range(50, 53))
    joined = first.fork()
    joined.append_from(other, unturned)
    assert joined.next_position == 9
    assert first.next_position == 6
    assert torch.equal(first.keys_values(0)[0][0], tokens.keys(range(6), 0, 8))
    assert joined.tables[0, 0] == first.tables[0, 0]  # the full page is still shared
    assert joined.tables[0, 1] != first.tables[0, 1]


def test_tokens_are_written_where_they_lie_beside_those_that_are_appended(
    cache: PagedCache,
) -> None:
    there, growing, also = (cache.new_sequence() for _ in range(3))
    for sequence, n in ((there, 11), (growing, 5), (also, 7)):
        tokens.grow(sequence, range(n))
    growing.reserve(2)
    at = [1, 6, 7, 5, 6, 0, 4]
    positions = torch.tensor(at, dtype=torch.int32)
    batch = BatchView(
        cache, [there, growing, also], [3, 2, 2], positions, in_place=[True, False, True]
    )
    assert batch.lengths[:, 0].tolist() == [11, 7, 7]
    k, v = torch.full((7, 2, 8), 5.0), torch.full((7, 2, 8), 6.0)
    k += torch.arange(7)[:, None, None]
    batch.append(0, k, v)
    growing.advance(2)
    for sequence, written, rows in ((there, [1, 6, 7], (0, 3)), (also, [0, 4], (5, 7))):
        expected = tokens.keys(range(len(sequence.positions(0, 0))), 1, 8)
        expected[written] = k[slice(*rows), 1]
        assert torch.equal(sequence.keys_values(0)[0][1], expected)
        assert sequence.positions(0, 1).tolist() == list(range(len(expected)))
    assert torch.equal(growing.keys_values(0)[0][0, 5:], k[3:5, 0])
