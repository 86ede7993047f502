"""A token that is taken out leaves its slot to the last one; nobody else notices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.cache import CacheLayout, Field, LayerShape, PagedCache, SequenceCache
from tamis.cache.order import TokenOrder
from tests.cache import tokens

LAYERS = (LayerShape(2, 8, 8), LayerShape(2, 8, 8), LayerShape(1, 8, 8, window=6))
COLUMNS = (Field("score", torch.float32, 1), Field("bound", torch.float32, 1, rows=1))
PAGE = 4


def grown(n: int) -> SequenceCache:
    cache = PagedCache(CacheLayout(LAYERS, PAGE, torch.float32), 200_000)
    sequence = cache.new_sequence(COLUMNS)
    tokens.grow(sequence, range(n))
    return sequence


def serials(sequence: SequenceCache, layer: int, head: int) -> list[int]:
    """The tokens of a head by their numbers, checked against their positions."""
    row = 2 * layer + head
    k = sequence.contents(layer, head, "k")
    held = ((k[:, 0] / 16 - row) / 16).long().tolist()
    assert torch.equal(k, tokens.keys(held, row, 8))
    assert sequence.positions(layer, head).tolist() == held
    return held


def lying(sequence: SequenceCache, layer: int) -> list[list[int]]:
    """The positions of a layer's tokens, slot by slot, as attention meets them."""
    pages = sequence.unordered_pages(range(layer, layer + 1))
    positions = pages.format.view(pages.data, "position")[pages.tables[0].long()].flatten(1)
    lengths = pages.lengths[0].tolist()
    return [row[:n] for row, n in zip(positions.tolist(), lengths, strict=True)]


def test_only_the_last_token_moves_and_the_rest_are_numbered_as_before() -> None:
    sequence = grown(10)
    sequence.take_out(range(2), np.array([3, 9, -1, 0]))
    assert lying(sequence, 0) == [[0, 1, 2, 9, 4, 5, 6, 7, 8], list(range(9))]
    assert lying(sequence, 1) == [list(range(10)), [9, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert serials(sequence, 0, 0) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert serials(sequence, 1, 1) == list(range(1, 10))
    k, _ = sequence.keys_values(range(2), 2, 5)
    assert torch.equal(k[0], tokens.keys([2, 4, 5], 0, 8))
    assert torch.equal(k[3], tokens.keys([3, 4, 5], 3, 8))


def test_one_in_and_one_out_keeps_the_pages_held_and_needs_no_reservation() -> None:
    sequence = grown(PAGE)
    tokens.grow(sequence, [PAGE])
    held, expected = sequence.bytes, list(range(PAGE + 1))
    generator = np.random.default_rng(0)
    for new in range(PAGE + 1, 40):
        gone = int(generator.integers(0, len(expected)))
        del expected[gone]
        sequence.take_out(range(2), np.full(4, gone))
        assert sequence.layer_room().min() >= 1
        sequence.keep(2, [np.arange(1, sequence.lengths[-1])])
        tokens.grow(sequence, [new])
        expected.append(new)
        assert serials(sequence, 0, 1) == serials(sequence, 1, 0) == expected
        assert sequence.bytes == held


def test_the_place_that_is_left_is_clean_for_the_next_token() -> None:
    sequence = grown(PAGE + 1)
    sequence.set_column(0, "score", torch.arange(1.0, 11).view(2, PAGE + 1, 1))
    sequence.set_summaries(0, "bound", 0, torch.ones(2, 2, 1, 1))
    sequence.take_out(0, np.array([1, 4]))
    tokens.grow(sequence, [7])
    assert sequence.column(0, "score")[..., 0].tolist() == [[1, 3, 4, 5, 0], [6, 7, 8, 9, 0]]
    assert sequence.summaries(0, "bound").flatten(1).tolist() == [[1, 0], [1, 0]]


def test_what_is_accumulated_goes_to_where_tokens_lie() -> None:
    sequence = grown(6)
    sequence.set_column(0, "score", torch.full((2, 6, 1), 2.0))
    sequence.take_out(0, np.array([0, 2]))
    paid = torch.tensor(lying(sequence, 0)).float()
    sequence.accumulate(range(1), "score", paid, decay=0.5)
    assert sequence.column(0, "score")[..., 0].tolist() == [[2, 3, 4, 5, 6], [1, 2, 4, 5, 6]]


def test_whole_pages_are_seen_in_order() -> None:
    sequence = grown(9)
    sequence.take_out(0, np.array([2, 5]))
    assert lying(sequence, 0)[0] != sorted(lying(sequence, 0)[0])
    sequence.pages(0)
    assert lying(sequence, 0) == [[0, 1, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 6, 7, 8]]
    assert serials(sequence, 0, 0) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_written_tokens_are_found_where_they_lie() -> None:
    sequence = grown(6)
    sequence.take_out(range(2), np.array([0, 1, 2, 3]))
    new = [tokens.keys([100 + row], row, 8) for row in range(4)]
    sequence.write(range(2), [np.array([4])] * 4, k=new)
    for row in range(4):
        assert torch.equal(sequence.contents(row // 2, row % 2, "k")[4:], new[row])
        assert len(sequence.contents(row // 2, row % 2, "k")) == 5


def test_branches_go_their_own_ways() -> None:
    sequence = grown(6)
    sequence.take_out(0, np.array([0, 0]))
    branch = sequence.fork()
    branch.take_out(0, np.array([0, 3]))
    sequence.keep(0, [np.array([1, 4]), np.array([0])])
    assert (serials(branch, 0, 0), serials(branch, 0, 1)) == ([2, 3, 4, 5], [1, 2, 3, 5])
    assert (serials(sequence, 0, 0), serials(sequence, 0, 1)) == ([2, 5], [1])


def test_rejected_drafts_are_those_that_came_last() -> None:
    sequence = grown(6)
    sequence.take_out(range(2), np.zeros(4, dtype=np.int64))
    sequence.take_out(range(2), np.zeros(4, dtype=np.int64))  # 5 and 4 lie first now
    sequence.keep(2, [np.arange(2, sequence.lengths[-1])])
    sequence.retract(2, [1])
    assert serials(sequence, 0, 0) == [2, 3, 5]


@pytest.mark.parametrize(
    ("layers", "gone"), [(0, [0, 6]), (0, [0, -2]), (0, [0]), (range(2), [0, 0]), (2, [0])]
)
def test_what_cannot_be_taken_out_changes_nothing(layers: int | range, gone: list[int]) -> None:
    sequence = grown(6)
    with pytest.raises(ValueError, match=r"taken? out"):
        sequence.take_out(layers, np.array(gone))
    assert serials(sequence, 0, 0) == list(range(6))


def test_a_copy_of_an_order_is_its_own() -> None:
    order = TokenOrder(1)
    order.take_out(np.array([0]), np.array([1]), np.array([4]))
    copy = order.copy()
    copy.settle(np.array([0]))
    assert order.slots(slice(0, 1), 4).tolist() == [[0, 2, 1, 3]]
    assert copy.slots(slice(0, 1), 4).tolist() == [[0, 1, 2, 3]]
