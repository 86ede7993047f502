"""A batch's view is the sequences' own tables, with and without the step's tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.cache import BatchView, CacheLayout, LayerShape, PagedCache, PageError
from tests.cache import tokens

LAYOUT = CacheLayout((LayerShape(2, 8, 8), LayerShape(1, 4, 6, window=5)), 4, torch.float32)


@pytest.fixture
def cache() -> PagedCache:
    return PagedCache(LAYOUT, 60_000)


def test_tables_and_lengths_are_those_of_the_sequences(cache: PagedCache) -> None:
    sequences = [cache.new_sequence() for _ in range(3)]
    for sequence, n in zip(sequences, (3, 17, 9), strict=True):
        tokens.grow(sequence, range(n))
    sequences[1].keep(0, [np.arange(17), np.array([2, 5])])
    new = [1, 6, 0]
    for sequence, n in zip(sequences, new, strict=True):
        sequence.reserve(n)
    positions = torch.tensor([3, *range(17, 23)], dtype=torch.int32)
    batch = BatchView(cache, sequences, new, positions)
    assert batch.starts.tolist() == [0, 1, 7, 7]
    for layer, (start, stop) in ((0, (0, 3)), (1, (0, 3)), (0, (1, 3)), (1, (2, 3))):
        rows = LAYOUT.rows(layer)
        before = batch.pages(layer, start, stop, with_new=False)
        after = batch.pages(layer, start, stop, with_new=True)
        assert before.format == after.format == LAYOUT.formats[layer]
        assert before.data is cache.arena.data
        assert before.tables.dtype == before.lengths.dtype == torch.int32
        assert before.tables.stride(-1) == 1
        for i, sequence in enumerate(sequences[start:stop]):
            assert before.lengths[i].tolist() == sequence.lengths[rows].tolist()
            added = after.lengths[i] - before.lengths[i]
            assert added.tolist() == [new[start + i]] * len(added)
            for head, row in enumerate(range(rows.start, rows.stop)):
                n_pages = sequence.page_counts[row]
                expected = sequence.tables[row, :n_pages].tolist()
                assert before.tables[i, head, :n_pages].tolist() == expected
                assert after.tables[i, head, :n_pages].tolist() == expected


def test_unused_table_entries_name_pages_within_the_arena(cache: PagedCache) -> None:
    short, long = cache.new_sequence(), cache.new_sequence()
    tokens.grow(long, range(30))
    short.reserve(1)
    long.reserve(1)
    batch = BatchView(cache, [short, long], [1, 1], torch.tensor([0, 30], dtype=torch.int32))
    for layer in range(2):
        pages = batch.pages(layer, 0, 2, with_new=True)
        assert pages.tables.min() >= 0
        assert pages.tables.max() < len(cache.pools[layer].view("k"))


def test_a_batch_writes_each_sequence_its_own_tokens(cache: PagedCache) -> None:
    sequences = [cache.new_sequence() for _ in range(3)]
    numbers = [range(5), range(100, 101), range(200, 213)]
    for sequence, new in zip(sequences, numbers, strict=True):
        sequence.reserve(len(new))
    tokens.append(cache, sequences, numbers)
    for sequence, new in zip(sequences, numbers, strict=True):
        for layer, shape in enumerate(LAYOUT.layers):
            for head in range(shape.kv_heads):
                row = LAYOUT.rows(layer).start + head
                assert sequence.positions(layer, head).tolist() == list(range(len(new)))
                k, v = (sequence.contents(layer, head, name) for name in "kv")
                assert torch.equal(k, tokens.keys(new, row, shape.k_dim))
                assert torch.equal(v, tokens.values(new, row, shape.v_dim))


def test_tokens_without_room_are_refused(cache: PagedCache) -> None:
    sequence = cache.new_sequence()
    sequence.reserve(3)
    batch = BatchView(cache, [sequence], [5], torch.arange(5, dtype=torch.int32))
    with pytest.raises(PageError, match="adds 5 tokens to a sequence with 4 reserved"):
        batch.append(0, torch.zeros(5, 2, 8), torch.zeros(5, 2, 8))
