"""Compaction moves kept tokens to the front and leaves whole unmoved pages alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.cache.compaction import plan_compaction, plan_retraction
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
        expected += [(head, source, i) for i, source in enumerate(kept) if source != i]
    moves = zip(plan.head.tolist(), plan.source.tolist(), plan.target.tolist(), strict=True)
    assert list(moves) == expected
    assert plan.lengths.tolist() == [len(kept) for _, kept in heads]
    assert plan.first_changed.tolist() == [
        first_changed(list(range(n)), kept, page_size) for n, kept in heads
    ]


def first_changed(before: list[int], after: list[int], page_size: int) -> int:
    """The first page that holds other tokens than before."""
    pages = range(0, len(after), page_size)
    same = [before[i : i + page_size] == after[i : i + page_size] for i in pages]
    if False in same:
        return same.index(False)
    # What was cut within a page changed that page; what was cut at its end changed none.
    return len(same)


@settings(derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(9, 40), min_size=1, max_size=4),
    n=st.integers(0, 9),
    data=st.data(),
    page_size=st.sampled_from([1, 4, 7]),
)
def test_a_retraction_moves_what_a_compaction_of_the_whole_would(
    lengths: list[int], n: int, data: st.DataObject, page_size: int
) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else []
    array = np.array(lengths, dtype=np.int32)
    plan = plan_retraction(array, n, kept, page_size)
    whole = [[*range(length - n), *(length - n + i for i in kept)] for length in lengths]
    want = plan_compaction(array, [np.array(row, dtype=np.int32) for row in whole], page_size)
    for name in ("lengths", "first_page", "first_changed"):
        assert getattr(plan, name).tolist() == getattr(want, name).tolist()
    moves = np.stack([plan.head, plan.source, plan.target])
    assert moves.tolist() == np.stack([want.head, want.source, want.target]).tolist()


@pytest.mark.parametrize(
    ("n", "kept", "message"),
    [
        (6, [0], "6 tokens retracted of a row with 5"),
        (-1, [], "-1 tokens retracted"),
        (3, [1, 1], r"must ascend within 0 \.\. 2, got \[1, 1\]"),
        (3, [3], r"must ascend within 0 \.\. 2"),
        (3, [-1, 0], r"must ascend within 0 \.\. 2"),
    ],
)
def test_impossible_retractions_are_refused(n: int, kept: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_retraction(np.array([9, 5], dtype=np.int32), n, kept, 4)


@pytest.mark.parametrize("kept", [[3, 2], [1, 1], [-1, 0], [0, 5]])
def test_indices_that_do_not_ascend_within_the_length_are_refused(kept: list[int]) -> None:
    lengths = np.array([9, 5], dtype=np.int32)
    with pytest.raises(ValueError, match=r"head 1 must ascend within 0 \.\. 4"):
        plan_compaction(lengths, [np.arange(9), np.array(kept)], 4)


def test_a_head_without_indices_is_refused() -> None:
    with pytest.raises(ValueError, match="indices for 2 heads, got 1"):
        plan_compaction(np.array([9, 5], dtype=np.int32), [np.arange(9)], 4)
