"""One sequence: room, windows, eviction, sharing and swapping, one behaviour at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.cache import (
    BatchView,
    CacheLayout,
    LayerShape,
    OutOfPages,
    OutOfSwap,
    PagedCache,
    PageError,
    SequenceCache,
)
from tests.cache import tokens

LAYERS = (LayerShape(2, 8, 8), LayerShape(1, 4, 6))
PAGE_BYTES = (320, 256)  # of the two formats, 4 tokens to a page


def make_cache(capacity: int = 60_000, swap_bytes: int = 0) -> PagedCache:
    return PagedCache(CacheLayout(LAYERS, 4, torch.float32), capacity, swap_bytes=swap_bytes)


def grown(cache: PagedCache, n: int) -> SequenceCache:
    """A sequence of the tokens number 0 .. n - 1."""
    sequence = cache.new_sequence()
    tokens.grow(sequence, range(n))
    return sequence


def serials(sequence: SequenceCache, layer: int, head: int) -> list[int]:
    """The numbers of a head's cached tokens, read from its keys; checks its values too."""
    row = sequence.layout.rows(layer).start + head
    k = sequence.contents(layer, head, "k")
    found = [(int(x) // 16 - row) // 16 for x in k[:, 0].tolist()]
    shape = sequence.layout.layers[layer]
    assert torch.equal(k, tokens.keys(found, row, shape.k_dim))
    v = sequence.contents(layer, head, "v")
    assert torch.equal(v, tokens.values(found, row, shape.v_dim))
    return found


class TestRoom:
    def test_a_new_sequence_holds_nothing(self) -> None:
        cache = make_cache()
        sequence = cache.new_sequence()
        assert (sequence.bytes, sequence.room, cache.bytes_in_use) == (0,) * 3

    def test_reserve_takes_whole_pages_and_no_more(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 6)
        assert sequence.page_counts.tolist() == [2, 2, 2]
        assert sequence.bytes == cache.bytes_in_use == 2 * (2 * 320 + 256)
        assert sequence.room == 2

    def test_room_within_a_page_costs_nothing(self) -> None:
        sequence = grown(make_cache(), 6)
        for n, pages in ((2, 2), (3, 3), (6, 3), (7, 4)):
            sequence.reserve(n)
            assert sequence.page_counts.tolist() == [pages] * 3

    def test_the_room_is_that_of_the_fullest_row(self) -> None:
        sequence = grown(make_cache(), 6)
        sequence.keep(0, [np.arange(4), np.arange(1)])
        sequence.reserve(1)
        assert sequence.page_counts.tolist() == [2, 1, 2]
        assert sequence.room == 2

    def test_reserving_again_does_not_add_up(self) -> None:
        sequence = grown(make_cache(), 6)
        sequence.reserve(5)
        held = sequence.bytes
        sequence.reserve(5)
        assert sequence.bytes == held

    def test_reserve_is_all_or_nothing_over_all_formats(self) -> None:
        cache = make_cache(capacity=3_000)
        sequence = grown(cache, 8)
        before = (cache.bytes_in_use, sequence.page_counts.tolist(), sequence.room)
        with pytest.raises(OutOfPages):
            sequence.reserve(12)
        assert (cache.bytes_in_use, sequence.page_counts.tolist(), sequence.room) == before
        sequence.reserve(4)

    def test_tokens_that_were_not_reserved_cannot_be_counted(self) -> None:
        sequence = grown(make_cache(), 6)
        with pytest.raises(PageError, match="3 tokens appended, 2 reserved"):
            sequence.advance(3)


class TestWindow:
    @pytest.mark.parametrize("page_size", [1, 4, 8])
    @pytest.mark.parametrize("window", [1, 5, 9])
    @pytest.mark.parametrize("chunk", [1, 3, 20])
    def test_all_that_the_next_query_sees_is_kept_and_no_page_besides(
        self, page_size: int, window: int, chunk: int
    ) -> None:
        layout = CacheLayout((LayerShape(2, 8, 8, window), *LAYERS), page_size, torch.float32)
        sequence = PagedCache(layout, 200_000).new_sequence()
        for start in range(0, 40, chunk):
            tokens.grow(sequence, range(start, start + chunk))
            end = start + chunk
            visible = range(max(0, end - window + 1), end)
            for head in range(2):
                positions = sequence.positions(0, head).tolist()
                assert positions == list(range(end - len(positions), end))
                assert positions[len(positions) - len(visible) :] == list(visible)
                first_pages = positions[:page_size]
                assert not first_pages or len(visible) == 0 or first_pages[-1] >= visible[0]
                assert serials(sequence, 0, head) == positions
            assert serials(sequence, 1, 0) == list(range(end))

    def test_after_eviction_no_visible_token_is_dropped(self) -> None:
        layout = CacheLayout((LayerShape(1, 8, 8, window=9),), 4, torch.float32)
        sequence = PagedCache(layout, 60_000).new_sequence()
        tokens.grow(sequence, range(9))
        sequence.keep(0, [np.array([0, 2, 4, 6, 8])])
        tokens.grow(sequence, range(9, 14))
        assert [p for p in sequence.positions(0, 0) if p > 14 - 9] == [6, 8, 9, 10, 11, 12, 13]

    def test_a_window_bounds_the_memory_of_any_length(self) -> None:
        layout = CacheLayout((LayerShape(2, 8, 8, window=10),), 4, torch.float32)
        cache = PagedCache(layout, 60_000)
        sequence = cache.new_sequence()
        for start in range(0, 500, 5):
            tokens.grow(sequence, range(start, start + 5))
        assert cache.bytes_peak <= layout.bytes_of(layout.peak_pages(500, chunk=5)) == 2 * 5 * 320

    def test_shared_pages_are_dropped_from_one_branch_only(self) -> None:
        layout = CacheLayout((LayerShape(1, 8, 8, window=5),), 4, torch.float32)
        sequence = PagedCache(layout, 60_000).new_sequence()
        tokens.grow(sequence, range(7))
        branch = sequence.fork()
        tokens.grow(sequence, range(7, 20))
        assert serials(branch, 0, 0) == list(range(7))
        assert serials(sequence, 0, 0) == list(range(16, 20))


class TestKeep:
    def test_heads_keep_different_tokens_with_their_positions(self) -> None:
        sequence = grown(make_cache(), 20)
        kept = [[0, 1, 7, 12, 19], [3]]
        sequence.keep(0, [np.array(head) for head in kept])
        assert [serials(sequence, 0, head) for head in range(2)] == kept
        assert [sequence.positions(0, head).tolist() for head in range(2)] == kept
        assert serials(sequence, 1, 0) == list(range(20))
        assert sequence.next_position == 20

    def test_pages_come_back_at_once(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 20)
        sequence.keep(0, [np.array([0, 1, 7, 12, 19]), np.array([], dtype=np.int64)])
        assert cache.bytes_in_use == sequence.bytes == 2 * 320 + 0 + 5 * 256

    def test_new_tokens_follow_the_kept_ones(self) -> None:
        sequence = grown(make_cache(), 20)
        sequence.keep(0, [np.array([0, 5, 9]), np.array([], dtype=np.int64)])
        tokens.grow(sequence, range(20, 26))
        assert sequence.positions(0, 0).tolist() == [0, 5, 9, *range(20, 26)]
        assert serials(sequence, 0, 1) == list(range(20, 26))
        assert serials(sequence, 1, 0) == list(range(26))

    def test_keeping_everything_writes_and_takes_nothing(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 18)
        branch = sequence.fork()
        before = sequence.tables.copy()
        sequence.keep(0, [np.arange(18), np.arange(18)])
        assert np.array_equal(sequence.tables, before)
        assert cache.bytes_in_use == branch.bytes

    def test_shared_pages_are_not_written(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 18)
        branch = sequence.fork()
        sequence.keep(0, [np.array([0, 1, 2, 3, 6, 17]), np.array([4])])
        assert serials(sequence, 0, 0) == [0, 1, 2, 3, 6, 17]
        assert serials(sequence, 0, 1) == [4]
        assert serials(branch, 0, 0) == serials(branch, 0, 1) == list(range(18))
        # The first page of head 0 did not change, so it is still shared.
        assert cache.bytes_in_use == branch.bytes + 2 * 320
        branch.free()
        assert cache.bytes_in_use == sequence.bytes

    def test_copies_of_shared_pages_are_all_or_nothing(self) -> None:
        cache = make_cache(capacity=6_000)
        sequence = grown(cache, 18)
        branch = sequence.fork()
        cache.device_tier.allocate(np.zeros(cache.pools[0].free_pages, dtype=np.int32))
        before = (cache.bytes_in_use, sequence.tables.tolist(), sequence.lengths.tolist())
        half = np.arange(1, 18, 2)
        with pytest.raises(OutOfPages):
            sequence.keep(0, [half, half])
        assert before == (cache.bytes_in_use, sequence.tables.tolist(), sequence.lengths.tolist())
        branch.free()
        sequence.keep(0, [half, half])
        assert serials(sequence, 0, 1) == half.tolist()

    def test_wrong_indices_change_nothing(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 6)
        with pytest.raises(ValueError, match="head 1 must ascend"):
            sequence.keep(0, [np.arange(2), np.array([6])])
        assert serials(sequence, 0, 0) == list(range(6))


class TestFork:
    def test_branches_share_all_pages_until_one_writes(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 10)
        in_use = cache.bytes_in_use
        branch = sequence.fork()
        assert cache.bytes_in_use == in_use
        assert branch.bytes == sequence.bytes
        tokens.grow(branch, [100])  # copies the half-full pages
        assert cache.bytes_in_use == in_use + 2 * 320 + 256
        tokens.grow(sequence, [200])  # its tail is its own again
        assert cache.bytes_in_use == in_use + 2 * 320 + 256
        assert serials(branch, 0, 1) == [*range(10), 100]
        assert serials(sequence, 0, 1) == [*range(10), 200]

    def test_neither_branch_writes_to_a_shared_page(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 10)
        branch = sequence.fork()
        shared = cache.pools[0].read(branch.tables[0, :3])
        tokens.grow(sequence, [200])
        assert torch.equal(cache.pools[0].read(branch.tables[0, :3]), shared)

    def test_full_pages_are_never_copied(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 8)
        branch = sequence.fork()
        tokens.grow(branch, [100])
        assert cache.bytes_in_use == sequence.bytes + 2 * 320 + 256
        assert np.array_equal(branch.tables[:, :2], sequence.tables[:, :2])

    def test_pages_reserved_ahead_stay_with_their_branch(self) -> None:
        sequence = grown(make_cache(), 6)
        sequence.reserve(9)
        branch = sequence.fork()
        assert sequence.page_counts.tolist() == [4, 4, 4]
        assert branch.page_counts.tolist() == [2, 2, 2]
        tokens.grow(sequence, range(200, 209))
        tokens.grow(branch, range(100, 109))
        assert serials(sequence, 0, 0) == [*range(6), *range(200, 209)]
        assert serials(branch, 0, 0) == [*range(6), *range(100, 109)]

    def test_a_tail_that_keep_uncovers_may_be_shared(self) -> None:
        sequence = grown(make_cache(), 10)
        branch = sequence.fork()
        tokens.grow(sequence, [200])  # the last page is its own now
        sequence.keep(0, [np.arange(6), np.arange(6)])  # ends within a shared page again
        tokens.grow(sequence, [201])
        assert serials(sequence, 0, 0) == [*range(6), 201]
        assert serials(branch, 0, 0) == list(range(10))

    def test_a_failed_copy_changes_nothing(self) -> None:
        cache = make_cache(capacity=6 * 320)
        sequence = grown(cache, 6)
        branch = sequence.fork()
        with pytest.raises(OutOfPages):
            branch.reserve(1)
        assert np.array_equal(branch.tables[:, :2], sequence.tables[:, :2])
        sequence.free()
        tokens.grow(branch, [100])
        assert serials(branch, 1, 0) == [*range(6), 100]


class TestSwap:
    def test_contents_survive_and_device_pages_are_free_meanwhile(self) -> None:
        cache = make_cache(swap_bytes=100_000)
        sequence = grown(cache, 18)
        sequence.keep(0, [np.array([0, 3, 17]), np.arange(18)])
        held = sequence.bytes
        sequence.swap_out()
        assert sequence.swapped
        assert (cache.bytes_in_use, cache.swap_bytes_in_use, sequence.bytes) == (0, held, held)
        other = grown(cache, 20)  # overwrites the pages that were freed
        sequence.swap_in()
        assert not sequence.swapped
        assert cache.swap_bytes_in_use == 0
        assert serials(sequence, 0, 0) == sequence.positions(0, 0).tolist() == [0, 3, 17]
        assert serials(sequence, 1, 0) == list(range(18))
        tokens.grow(sequence, range(18, 23))
        assert serials(sequence, 0, 0) == [0, 3, 17, *range(18, 23)]
        assert serials(other, 0, 1) == list(range(20))

    def test_reserved_pages_are_not_swapped(self) -> None:
        cache = make_cache(swap_bytes=100_000)
        sequence = grown(cache, 6)
        sequence.reserve(30)
        sequence.swap_out()
        assert cache.swap_bytes_in_use == 2 * (2 * 320 + 256)
        assert cache.bytes_in_use == 0

    def test_the_host_budget_holds(self) -> None:
        layout = CacheLayout(LAYERS, 4, torch.float32)
        cache = make_cache(swap_bytes=layout.capacity_for(layout.peak_pages(6)))
        first, second = grown(cache, 6), grown(cache, 6)
        first.swap_out()
        in_use = cache.bytes_in_use
        with pytest.raises(OutOfSwap, match="1792 bytes to swap out, 128 bytes"):
            second.swap_out()
        assert not second.swapped
        assert cache.bytes_in_use == in_use
        first.free()
        second.swap_out()

    def test_swap_in_is_all_or_nothing(self) -> None:
        cache = make_cache(capacity=3_000, swap_bytes=100_000)
        sequence = grown(cache, 8)
        sequence.swap_out()
        other = grown(cache, 8)
        with pytest.raises(OutOfPages):
            sequence.swap_in()
        assert sequence.swapped
        other.free()
        sequence.swap_in()
        assert serials(sequence, 0, 0) == list(range(8))

    def test_a_swapped_branch_leaves_the_other_its_pages(self) -> None:
        cache = make_cache(swap_bytes=100_000)
        sequence = grown(cache, 10)
        branch = sequence.fork()
        branch.swap_out()
        tokens.grow(sequence, [200])
        branch.swap_in()
        tokens.grow(branch, [100])
        assert serials(sequence, 0, 0) == [*range(10), 200]
        assert serials(branch, 0, 0) == [*range(10), 100]

    def test_a_swapped_sequence_cannot_be_used(self) -> None:
        cache = make_cache(swap_bytes=100_000)
        sequence = grown(cache, 6)
        sequence.swap_out()
        for use in (
            lambda: sequence.reserve(1),
            lambda: sequence.keep(0, [np.arange(2), np.arange(2)]),
            sequence.fork,
            sequence.swap_out,
            lambda: sequence.contents(0, 0, "k"),
        ):
            with pytest.raises(PageError, match="swapped out"):
                use()

    def test_a_resident_sequence_cannot_be_swapped_in(self) -> None:
        with pytest.raises(PageError, match="not swapped out"):
            grown(make_cache(), 6).swap_in()


class TestFree:
    @pytest.mark.parametrize("swapped", [False, True])
    def test_everything_is_given_back_once(self, swapped: bool) -> None:
        cache = make_cache(swap_bytes=100_000)
        other = grown(cache, 6)
        sequence = grown(cache, 6)
        if swapped:
            sequence.swap_out()
        for _ in range(2):
            sequence.free()
            assert cache.bytes_in_use == other.bytes
            assert cache.swap_bytes_in_use == 0
            assert sequence.bytes == 0
        with pytest.raises(PageError, match="freed"):
            sequence.reserve(1)

    def test_a_branch_outlives_its_parent(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 10)
        branch = sequence.fork()
        sequence.free()
        assert cache.bytes_in_use == branch.bytes
        assert serials(branch, 1, 0) == list(range(10))


class TestLayers:
    def test_room_is_made_in_some_layers_only(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 4)
        sequence.reserve(3, range(1, 2))
        assert sequence.page_counts.tolist() == [1, 1, 2]
        assert sequence.layer_room().tolist() == [0, 4]
        assert sequence.room == 0
        assert cache.bytes_in_use == sequence.bytes == 2 * 320 + 2 * 256

    def test_tokens_may_pass_through_some_layers_only(self) -> None:
        sequence = grown(make_cache(), 4)
        tokens.grow(sequence, [50, 51, 52], range(1))
        assert sequence.next_position == 4
        assert serials(sequence, 0, 1) == [0, 1, 2, 3, 50, 51, 52]
        assert serials(sequence, 1, 0) == [0, 1, 2, 3]
        sequence.next_position = 7
        tokens.grow(sequence, [60])
        assert sequence.positions(0, 0).tolist() == list(range(8))
        assert sequence.positions(1, 0).tolist() == [0, 1, 2, 3, 7]
        assert sequence.next_position == 8

    def test_all_layers_named_are_all_layers(self) -> None:
        sequence = make_cache().new_sequence()
        tokens.grow(sequence, range(3), range(2))
        assert sequence.next_position == 3

    def test_layers_without_room_can_be_read_and_not_appended_to(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 4)
        sequence.reserve(2, range(1))
        batch = BatchView(cache, [sequence], [2], torch.tensor([4, 5], dtype=torch.int32))
        assert batch.pages(1, 0, 1, with_new=False).lengths.tolist() == [[4]]
        with pytest.raises(PageError, match="adds 2 tokens to a sequence with 0 reserved"):
            batch.append(1, torch.zeros(2, 1, 4), torch.zeros(2, 1, 6))

    def test_a_shared_tail_is_copied_in_those_layers_only(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 6)
        branch = sequence.fork()
        tokens.grow(branch, [100], range(1))
        assert cache.bytes_in_use == sequence.bytes + 2 * 320
        tokens.grow(branch, [101], range(1, 2))
        assert cache.bytes_in_use == sequence.bytes + 2 * 320 + 256
        assert serials(sequence, 0, 0) == serials(sequence, 1, 0) == list(range(6))
        assert serials(branch, 1, 0) == [*range(6), 101]

    def test_more_tokens_than_reserved_cannot_be_counted(self) -> None:
        sequence = grown(make_cache(), 6)
        sequence.fork()
        with pytest.raises(PageError, match="1 tokens appended to some layers, 0 reserved"):
            sequence.advance(1, range(1))
        sequence.reserve(1, range(1))
        with pytest.raises(PageError, match="3 tokens appended to some layers, 2 reserved"):
            sequence.advance(3, range(1))

    @pytest.mark.parametrize("layers", [range(3), range(-1, 1), range(0), range(0, 2, 2)])
    def test_layers_are_a_run_of_the_models(self, layers: range) -> None:
        with pytest.raises(ValueError, match=r"consecutive within 0 \.\. 1"):
            make_cache().new_sequence().reserve(1, layers)

    def test_nothing_changes_when_pages_are_short(self) -> None:
        cache = make_cache(capacity=3_000)
        sequence = grown(cache, 8)
        before = (cache.bytes_in_use, sequence.page_counts.tolist(), sequence.room)
        with pytest.raises(OutOfPages):
            sequence.reserve(40, range(1))
        assert (cache.bytes_in_use, sequence.page_counts.tolist(), sequence.room) == before


class TestRetract:
    @pytest.mark.parametrize(
        ("n", "kept"), [(5, [0, 2, 4]), (5, []), (5, [0, 1]), (5, [4]), (0, []), (3, [0, 1, 2])]
    )
    def test_the_last_tokens_are_thinned_in_every_row(self, n: int, kept: list[int]) -> None:
        cache = make_cache()
        sequence = grown(cache, 20)
        sequence.keep(0, [np.arange(20), np.arange(9, 20)])
        sequence.retract(n, kept)
        last = [20 - n + i for i in kept]
        assert serials(sequence, 0, 0) == serials(sequence, 1, 0) == [*range(20 - n), *last]
        assert serials(sequence, 0, 1) == [*range(9, 20 - n), *last]
        assert sequence.positions(0, 1).tolist() == [*range(9, 20 - n), *last]
        assert sequence.next_position == 20 - n + len(kept)
        used = -(-sequence.lengths // 4)
        assert sequence.page_counts.tolist() == used.tolist()
        assert cache.bytes_in_use == sequence.bytes
        tokens.grow(sequence, [77])
        assert serials(sequence, 0, 1) == [*range(9, 20 - n), *last, 77]

    def test_a_fork_keeps_what_the_other_retracts(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 10)
        branch = sequence.fork()
        branch.retract(4, [1, 3])
        assert serials(branch, 0, 0) == [*range(6), 7, 9]
        assert serials(sequence, 0, 0) == list(range(10))
        assert cache.bytes_in_use == sequence.bytes + 2 * 320 + 256

    def test_copies_are_all_or_nothing(self) -> None:
        cache = make_cache(capacity=6_000)
        sequence = grown(cache, 10)
        branch = sequence.fork()
        cache.device_tier.allocate(np.zeros(cache.pools[0].free_pages, dtype=np.int32))
        before = (cache.bytes_in_use, branch.tables.tolist(), branch.lengths.tolist())
        with pytest.raises(OutOfPages):
            branch.retract(4, [1, 3])
        assert before == (cache.bytes_in_use, branch.tables.tolist(), branch.lengths.tolist())
        assert branch.next_position == 10
        branch.retract(4, [])  # nothing is moved, so nothing is copied
        assert serials(branch, 1, 0) == list(range(6))

    def test_impossible_retractions_change_nothing(self) -> None:
        sequence = grown(make_cache(), 6)
        for n, kept in ((7, [0]), (3, [3]), (3, [1, 0])):
            with pytest.raises(ValueError, match=r"retracted|ascend"):
                sequence.retract(n, kept)
        assert serials(sequence, 0, 0) == list(range(6))
        assert sequence.next_position == 6


class TestDropFront:
    def test_heads_lose_different_numbers_of_leading_pages(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 14)
        sequence.drop_front(0, np.array([2, 0], dtype=np.int32))
        assert serials(sequence, 0, 0) == list(range(8, 14))
        assert serials(sequence, 0, 1) == serials(sequence, 1, 0) == list(range(14))
        assert cache.bytes_in_use == sequence.bytes == (2 + 4) * 320 + 4 * 256
        tokens.grow(sequence, range(14, 20))
        assert serials(sequence, 0, 0) == list(range(8, 20))

    def test_a_fork_keeps_what_the_other_drops(self) -> None:
        cache = make_cache()
        sequence = grown(cache, 14)
        branch = sequence.fork()
        branch.drop_front(0, np.array([3, 1], dtype=np.int32))
        assert serials(branch, 0, 1) == list(range(4, 14))
        assert serials(sequence, 0, 1) == list(range(14))
        assert cache.bytes_in_use == sequence.bytes

    def test_only_full_pages_are_dropped(self) -> None:
        sequence = grown(make_cache(), 14)
        with pytest.raises(PageError, match=r"\[4, 0\] pages to drop of \[3, 3\] full ones"):
            sequence.drop_front(0, np.array([4, 0], dtype=np.int32))
        assert serials(sequence, 0, 0) == list(range(14))
