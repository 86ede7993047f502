"""Compaction moves kept tokens to the front and leaves whole unmoved pages alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.cache.compaction import plan_compaction
from tamis.cache.pool import ragged_arange


def test_ragged_arange_counts_within_each_run() -> None:
    counts = np.array([2, 0, 3], dtype=np.int32)
    assert ragged_arange(counts).tolist() == [0, 1, 0, 1, 2]
    assert ragged_arange(np.zeros(0, dtype=np.int32)).tolist() == []


heads = st.lists(
    st.integers(0, 30).flatmap(
        lambda n: st.tuples(
            st.just(n), st.sets(st.integers(0, n - 1)).map(sorted) if n else st.just([])
        )
    ),
    min_size=1,
    max_size=4,
)


@settings(derandomize=True, deadline=None)
@given(heads=heads, page_size=st.sampled_from([1, 4, 7]))
def test_the_moves_are_those_of_a_naive_compaction(
    heads: list[tuple[int, list[int]]], page_size: int
) -> None:
    lengths = np.array([n for n, _ in heads], dtype=np.int32)
    plan = plan_compaction(
        lengths, [np.array(kept, dtype=np.int64) for _, kept in heads], page_size
    )
    expected = []
    for head, (_, kept) in enumerate(heads):
        pages = [kept[i : i + page_size] for i in range(0, len(kept), page_size)]
        in_place = [
            page == list(range(i * page_size, i * page_size + len(page)))
            for i, page in enumerate(pages)
        ]
        first = in_place.index(False) if False in in_place else len(pages)
        assert plan.first_page[head] == first
        expected += [(head, kept[i], i) for i in range(first * page_size, len(kept))]
    moves = zip(plan.head.tolist(), plan.source.tolist(), plan.target.tolist(), strict=True)
    assert list(moves) == expected
    assert plan.lengths.tolist() == [len(kept) for _, kept in heads]


@pytest.mark.parametrize("kept", [[3, 2], [1, 1], [-1, 0], [0, 5]])
def test_indices_that_do_not_ascend_within_the_length_are_refused(kept: list[int]) -> None:
    lengths = np.array([9, 5], dtype=np.int32)
    with pytest.raises(ValueError, match=r"head 1 must ascend within 0 \.\. 4"):
        plan_compaction(lengths, [np.arange(9), np.array(kept)], 4)


def test_a_head_without_indices_is_refused() -> None:
    with pytest.raises(ValueError, match="indices for 2 heads, got 1"):
        plan_compaction(np.array([9, 5], dtype=np.int32), [np.arange(9)], 4)
