"""What lies beside the tokens goes where they go, and can be read and written head by head."""

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
    OutOfPages,
    PagedCache,
    PageError,
    SequenceCache,
)
from tamis.cache.pool import as_integers
from tamis.errors import ConfigError
from tests.cache import tokens

LAYOUT = CacheLayout((LayerShape(2, 8, 8), LayerShape(1, 4, 6)), 4, torch.float32)
SCORE = Field("score", torch.float32, 1)
CODE = Field("code", torch.uint8, 3)
BOUND = Field("bound", torch.bfloat16, 8, rows=2)
COLUMNS = (SCORE, CODE, BOUND)
COLUMN_BYTES = 3 * 64  # each of the three fits a unit


def make_cache(capacity: int = 100_000, swap_bytes: int = 0) -> PagedCache:
    return PagedCache(LAYOUT, capacity, swap_bytes=swap_bytes)


def grown(cache: PagedCache, n: int, columns: tuple[Field, ...] = COLUMNS) -> SequenceCache:
    sequence = cache.new_sequence(columns)
    tokens.grow(sequence, range(n))
    return sequence


def uneven(cache: PagedCache) -> SequenceCache:
    """Layer 0 holds tokens 0 .. 9 in head 0 and the tokens 3, 5 in head 1."""
    sequence = grown(cache, 10)
    sequence.keep(0, [np.arange(10), np.array([3, 5])])
    return sequence


def codes(n: int) -> torch.Tensor:
    """Distinct codes of the tokens of two heads, uint8 [2, n, 3]."""
    return torch.arange(2 * n * 3, dtype=torch.uint8).view(2, n, 3)


def bounds(first: int, pages: int) -> torch.Tensor:
    """Distinct summaries of pages of two heads, exact in bfloat16, [2, pages, 2, 8]."""
    return first + torch.arange(2.0 * pages).view(2, pages, 1, 1).expand(-1, -1, 2, 8)


class TestColumns:
    def test_pages_are_larger_by_the_columns_and_no_more(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 6)
        expected = 2 * (2 * 320 + 256) + 6 * COLUMN_BYTES
        assert sequence.bytes == cache.bytes_in_use == expected
        assert sequence.layout.bytes_for(6) == expected
        assert cache.distinct_bytes([sequence, sequence.fork()]) == expected

    def test_new_tokens_have_zero_columns_whatever_lay_there(self) -> None:
        cache = make_cache()
        cache.arena.data.fill_(255)
        sequence = grown(cache, 6)
        for name in ("score", "code"):
            assert sequence.column(0, name).shape[:2] == (2, 6)
            assert not sequence.column(0, name).any()
        assert not sequence.summaries(0, "bound").any()

    def test_a_column_is_read_as_it_was_written(self) -> None:
        sequence = grown(make_cache(), 10)
        sequence.set_column(0, "code", codes(10))
        assert torch.equal(sequence.column(0, "code"), codes(10))
        assert not sequence.column(1, "code").any()
        assert torch.equal(sequence.contents(0, 1, "code"), codes(10)[1])

    def test_what_is_written_beyond_a_heads_length_is_ignored(self) -> None:
        sequence = uneven(make_cache())
        sequence.reserve(1)  # so that nothing is cleared on the way to the next token
        sequence.set_column(0, "code", codes(10))
        expected = codes(10)
        expected[1, 2:] = 0
        assert torch.equal(sequence.column(0, "code"), expected)
        sequence.accumulate(0, "score", torch.ones(2, 10))
        tokens.grow(sequence, [10])
        assert sequence.column(0, "score")[1, :4, 0].tolist() == [1, 1, 0, 0]
        assert not sequence.column(0, "code")[1, 2:].any()

    def test_nan_beyond_a_heads_length_does_no_harm(self) -> None:
        sequence = uneven(make_cache())
        values = torch.ones(2, 10)
        values[1, 2:] = torch.nan
        sequence.accumulate(0, "score", values)
        assert sequence.column(0, "score")[1, :, 0].tolist() == [1, 1] + [0] * 8

    def test_accumulated_values_add_up(self) -> None:
        sequence = grown(make_cache(), 10)
        sequence.accumulate(0, "score", torch.arange(20.0).view(2, 10))
        sequence.accumulate(0, "score", torch.ones(2, 10))
        assert torch.equal(sequence.column(0, "score")[..., 0], torch.arange(20.0).view(2, 10) + 1)

    def test_columns_go_with_their_tokens(self) -> None:
        cache = make_cache(swap_bytes=100_000)
        sequence = grown(cache, 10)
        sequence.set_column(0, "code", codes(10))
        sequence.keep(0, [np.array([1, 4, 9]), np.array([0, 2, 3])])
        sequence.swap_out()
        sequence.swap_in()
        branch = sequence.fork()
        branch.retract(1, [])
        for of_branch, n in ((sequence, 3), (branch, 2)):
            assert torch.equal(of_branch.column(0, "code")[0], codes(10)[0, [1, 4, 9]][:n])
            assert torch.equal(of_branch.column(0, "code")[1], codes(10)[1, [0, 2, 3]][:n])

    @pytest.mark.parametrize("cut", ["keep", "retract"])
    @pytest.mark.parametrize("freed", [False, True])
    def test_tokens_that_went_leave_nothing_in_a_shared_page(self, cut: str, freed: bool) -> None:
        sequence = grown(make_cache(), 7)
        sequence.accumulate(0, "score", torch.ones(2, 7))
        branch = sequence.fork()
        if cut == "keep":
            branch.keep(0, [np.arange(5), np.arange(5)])
        else:
            branch.retract(2, [])
        if freed:
            sequence.free()
        tokens.grow(branch, range(100, 103))
        assert branch.column(0, "score")[0, :8, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
        if not freed:
            assert sequence.column(0, "score").sum() == 14

    def test_a_batch_mixes_sequences_of_different_columns(self) -> None:
        cache = make_cache()
        sequences = [grown(cache, 5), grown(cache, 3, ()), grown(cache, 4, (SCORE,))]
        for sequence in sequences:
            sequence.reserve(2)
        tokens.append(cache, sequences, [[50, 51], [60, 61], [70, 71]])
        for sequence, first, new in zip(sequences, (5, 3, 4), (50, 60, 70), strict=True):
            held = [*range(first), new, new + 1]
            assert torch.equal(sequence.contents(0, 1, "k"), tokens.keys(held, 1, 8))
            assert torch.equal(sequence.contents(1, 0, "v"), tokens.values(held, 2, 6))
        assert not sequences[0].column(0, "score").any()

    def test_attention_reads_the_pages_as_a_batch_does(self) -> None:
        cache = make_cache()
        sequence = uneven(cache)
        batch = BatchView(cache, [sequence], [0], torch.zeros(0, dtype=torch.int32))
        own, seen = sequence.pages(0), batch.pages(0, 0, 1, with_new=False)
        assert own.lengths.tolist() == seen.lengths.tolist() == [[10, 2]]
        for head, n in ((0, 3), (1, 1)):
            ids = own.tables[0, head, :n]
            assert ids.tolist() == seen.tables[0, head, :n].tolist()
            for name in ("k", "v", "position"):
                # As integers: rows that hold no token yet may be any numbers, NaN among them.
                rows = as_integers(own.format.view(own.data, name))[ids.long()]
                others = as_integers(seen.format.view(seen.data, name))[ids.long()]
                assert torch.equal(rows, others)

    def test_sequences_with_equal_columns_share_a_pool(self) -> None:
        cache = make_cache()
        assert len(cache.pools) == 2
        for _ in range(3):
            cache.new_sequence(COLUMNS)
        assert len(cache.pools) == 4
        assert cache.pool(LAYOUT.formats[0].extended(COLUMNS)) is cache.pools[2]

    def test_columns_whose_page_no_block_holds_are_refused(self) -> None:
        cache = make_cache()
        wide = (Field("wide", torch.float32, 2_000),)
        with pytest.raises(ConfigError, match=r"32\d\d\d bytes .4 tokens of k, v, position, wide"):
            cache.new_sequence(wide)
        required = cache.required_bytes(10, columns=wide)
        roomy = PagedCache(LAYOUT, required)
        assert roomy.fits(10, columns=wide)
        tokens.grow(roomy.new_sequence(wide), range(10))
        with pytest.raises(ConfigError, match="smaller page_size"):
            cache.required_bytes(10, columns=(Field("huge", torch.float32, 100_000),))

    def test_columns_cannot_replace_the_keys(self) -> None:
        with pytest.raises(ConfigError, match="names that differ"):
            make_cache().new_sequence((Field("k", torch.float32, 1),))

    @pytest.mark.parametrize("capacity", [5_000, 30_000, 1_000_000])
    def test_required_bytes_count_the_columns(self, capacity: int) -> None:
        n = capacity // 500
        required = make_cache().required_bytes(n, columns=COLUMNS)
        cache = PagedCache(LAYOUT, required)
        assert cache.fits(n, columns=COLUMNS)
        cache.new_sequence(COLUMNS).reserve(n)


class TestSummaries:
    def test_summaries_lie_with_their_pages(self) -> None:
        sequence = uneven(make_cache())  # three pages, and one
        sequence.set_summaries(0, "bound", 0, bounds(1, 3))
        expected = bounds(1, 3).clone()
        expected[1, 1:] = 0
        read = sequence.summaries(0, "bound")
        assert read.dtype == torch.bfloat16
        assert torch.equal(read.float(), expected)
        assert torch.equal(sequence.summaries(0, "bound", 1).float(), expected[:, 1:])

    def test_later_pages_are_added_to_earlier_ones(self) -> None:
        sequence = grown(make_cache(), 8)
        sequence.set_summaries(0, "bound", 0, bounds(1, 2))
        tokens.grow(sequence, range(8, 16))
        assert not sequence.summaries(0, "bound", 2).any()
        sequence.set_summaries(0, "bound", 2, bounds(10, 2))
        expected = torch.cat([bounds(1, 2), bounds(10, 2)], dim=1)
        assert torch.equal(sequence.summaries(0, "bound").float(), expected)

    def test_forks_and_swaps_carry_summaries(self) -> None:
        sequence = grown(make_cache(swap_bytes=100_000), 8)
        sequence.set_summaries(0, "bound", 0, bounds(1, 2))
        branch = sequence.fork()
        branch.set_summaries(0, "bound", 1, bounds(10, 1))
        branch.swap_out()
        branch.swap_in()
        assert torch.equal(sequence.summaries(0, "bound").float(), bounds(1, 2))
        expected = torch.cat([bounds(1, 2)[:, :1], bounds(10, 1)], dim=1)
        assert torch.equal(branch.summaries(0, "bound").float(), expected)

    def test_keep_says_which_pages_changed(self) -> None:
        sequence = grown(make_cache(), 20)
        summaries = bounds(1, 5)
        sequence.set_summaries(0, "bound", 0, summaries)
        changed = sequence.keep(0, [np.array([0, 1, 2, 3, 5, 6, 7, 9]), np.arange(20)])
        assert changed.tolist() == [1, 5]
        assert torch.equal(sequence.summaries(0, "bound")[0, :1].float(), summaries[0, :1])
        assert torch.equal(sequence.summaries(0, "bound")[1].float(), summaries[1])
        # A page that was cut short has changed too, though nothing was moved.
        assert sequence.keep(0, [np.arange(8), np.arange(14)]).tolist() == [2, 3]
        assert sequence.retract(1, []).tolist() == [1, 3, 4]

    def test_more_pages_than_there_are_cannot_be_set(self) -> None:
        sequence = grown(make_cache(), 8)
        with pytest.raises(ValueError, match=r"bound must be \[2, 1, 2, 8\], got \[2, 2, 2, 8\]"):
            sequence.set_summaries(0, "bound", 1, bounds(1, 2))


class TestReadAndWrite:
    def test_keys_and_values_are_padded_with_zeros(self) -> None:
        sequence = uneven(make_cache())
        k, v = sequence.keys_values(0, 1, 9)
        assert k.shape == v.shape == (2, 8, 8)
        assert torch.equal(k[0], tokens.keys(range(1, 9), 0, 8))
        assert torch.equal(v[1, :1], tokens.values([5], 1, 8))
        assert not k[1, 1:].any()
        assert not v[1, 1:].any()

    @pytest.mark.parametrize(("start", "stop", "n"), [(8, 40, 2), (10, None, 0), (30, 40, 0)])
    def test_a_range_ends_with_the_longest_head(self, start: int, stop: int | None, n: int) -> None:
        k, v = uneven(make_cache()).keys_values(0, start, stop)
        assert k.shape == v.shape == (2, n, 8)

    def test_positions_are_padded_with_minus_one(self) -> None:
        positions = uneven(make_cache()).positions_of(0)
        assert positions.dtype == torch.int32
        assert positions.tolist() == [list(range(10)), [3, 5] + [-1] * 8]

    def test_an_empty_layer_reads_as_no_tokens(self) -> None:
        sequence = make_cache().new_sequence(COLUMNS)
        assert sequence.positions_of(0).shape == (2, 0)
        assert [x.shape for x in sequence.keys_values(1)] == [(1, 0, 4), (1, 0, 6)]
        assert sequence.summaries(0, "bound").shape == (2, 0, 2, 8)
        sequence.accumulate(0, "score", torch.zeros(2, 0))

    def test_writing_changes_those_tokens_and_no_other(self) -> None:
        sequence = uneven(make_cache())
        new = [[100, 101, 102], [200]]
        sequence.write(
            0,
            [np.array([8, 0, 5]), np.array([1])],
            v=[tokens.values(head, row, 8) for row, head in enumerate(new)],
        )
        held = [[101, 1, 2, 3, 4, 102, 6, 7, 100, 9], [3, 200]]
        for head in range(2):
            assert torch.equal(sequence.contents(0, head, "v"), tokens.values(held[head], head, 8))
        assert torch.equal(sequence.contents(0, 0, "k"), tokens.keys(range(10), 0, 8))
        assert sequence.positions(0, 0).tolist() == list(range(10))

    def test_written_elements_take_the_caches_dtype(self) -> None:
        layout = CacheLayout(LAYOUT.layers, 4, torch.bfloat16)
        sequence = PagedCache(layout, 60_000).new_sequence()
        sequence.reserve(3)
        sequence.advance(3)
        sequence.write(1, [np.array([2])], k=[torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        assert sequence.contents(1, 0, "k")[2].tolist() == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("indices", "k", "message"),
        [
            ([[0]], None, "indices for 2 heads, got 1"),
            ([[0], [2]], None, r"head 1 must lie within 0 \.\. 1"),
            ([[-1], [0]], None, r"head 0 must lie within 0 \.\. 9"),
            ([[0], [1]], [torch.zeros(1, 8), torch.zeros(2, 8)], r"per head \[m, 8\]"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, indices: list[list[int]], k: list[torch.Tensor] | None, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            uneven(make_cache()).write(0, [np.array(head) for head in indices], k=k)

    def test_columns_of_another_shape_are_refused(self) -> None:
        sequence = grown(make_cache(), 6)
        with pytest.raises(ValueError, match=r"code must be \[2, 6, 3\], got \[2, 5, 3\]"):
            sequence.set_column(0, "code", codes(5))
        with pytest.raises(ValueError, match=r"score must be \[2, 6\], got \[1, 6\]"):
            sequence.accumulate(0, "score", torch.zeros(1, 6))


WRITES: list[Callable[[SequenceCache], object]] = [
    lambda s: s.write(0, [np.arange(6)] * 2, k=[torch.zeros(6, 8)] * 2),
    lambda s: s.set_column(0, "code", codes(6)),
    lambda s: s.accumulate(0, "score", torch.ones(2, 6)),
    lambda s: s.set_summaries(0, "bound", 0, bounds(1, 2)),
    lambda s: s.unshare(range(1)),
]


@pytest.mark.parametrize("write", WRITES)
class TestSharedPages:
    def test_a_branch_writes_to_its_own_copies(
        self, write: Callable[[SequenceCache], object]
    ) -> None:
        cache = make_cache()
        sequence = grown(cache, 6)
        branch = sequence.fork()
        pool, ids = sequence.pool(LAYOUT.rows(0)), sequence.tables[:2, :2].ravel()
        before = pool.read(ids)
        for _ in range(2):  # once copied, the pages are the branch's own
            write(branch)
            assert torch.equal(pool.read(ids), before)
            assert cache.bytes_in_use == sequence.bytes + 4 * (320 + COLUMN_BYTES)
        branch.free()
        assert cache.bytes_in_use == sequence.bytes

    def test_other_layers_stay_shared_and_protected(
        self, write: Callable[[SequenceCache], object]
    ) -> None:
        sequence = grown(make_cache(), 6)
        branch = sequence.fork()
        write(branch)
        assert branch.tables[2, :2].tolist() == sequence.tables[2, :2].tolist()
        branch.accumulate(1, "score", torch.ones(1, 6))
        assert not sequence.column(1, "score").any()

    def test_copies_that_do_not_fit_change_nothing(
        self, write: Callable[[SequenceCache], object]
    ) -> None:
        cache = make_cache(capacity=10_000)
        sequence = grown(cache, 6)
        branch = sequence.fork()
        pool, ids = sequence.pool(LAYOUT.rows(0)), sequence.tables[:2, :2].ravel()
        cache.device_tier.allocate(np.full(pool.free_pages - 3, 2, dtype=np.int32))
        before = (cache.bytes_in_use, branch.tables.tolist(), pool.read(ids).tolist())
        with pytest.raises(OutOfPages):
            write(branch)
        assert before == (cache.bytes_in_use, branch.tables.tolist(), pool.read(ids).tolist())
        sequence.free()
        write(branch)

    def test_a_swapped_sequence_is_not_written(
        self, write: Callable[[SequenceCache], object]
    ) -> None:
        sequence = grown(make_cache(swap_bytes=100_000), 6)
        sequence.swap_out()
        with pytest.raises(PageError, match="swapped out"):
            write(sequence)
