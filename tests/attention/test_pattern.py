"""Patterns and token lists refuse what is malformed, and density counts what is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention.pattern import SparsePattern, TokenList
from tests.attention import naive
from tests.attention.test_prefill_sparse import random_pattern


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=2),
    group=st.integers(1, 3),
    tokens=st.integers(1, 80),
    block=st.sampled_from([1, 5, 16, 100]),
    seed=st.integers(0, 1000),
)
def test_density_counts_each_pair_once(
    lengths: list[int], group: int, tokens: int, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    heads = group * len(lengths)
    pattern = random_pattern(heads, tokens, tokens + max(lengths), block, 1)
    computed = causal = 0
    for head in range(heads):
        length = lengths[head // group]
        for query in range(tokens):
            seen = naive.pattern_row(pattern, head, query, length, length + query + 1)
            computed += int(seen.sum())
            causal += len(seen)
    density = pattern.density(torch.tensor(lengths), tokens)
    assert density == pytest.approx(computed / causal, abs=1e-12)


def test_density_of_whole_blocks_needs_no_tokens() -> None:
    pattern = SparsePattern.from_blocks(torch.eye(4, dtype=torch.bool)[None], block=16)
    assert pattern.density(torch.tensor([0])) == 4 * 16 * 17 / 2 / (64 * 65 / 2)


def test_density_of_an_empty_chunk_is_one() -> None:
    pattern = SparsePattern.from_blocks(torch.zeros(2, 0, 3, dtype=torch.bool))
    assert pattern.density(torch.tensor([7])) == 1.0


def test_from_blocks_lists_what_the_mask_holds() -> None:
    mask = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]]).bool()
    pattern = SparsePattern.from_blocks(mask, [torch.tensor([9, 2, 9]), torch.tensor([])], block=8)
    assert pattern.block_starts.tolist() == [[0, 2, 2], [2, 3, 6]]
    assert pattern.blocks.tolist() == [0, 2, 1, 0, 1, 2]
    assert pattern.column_starts.tolist() == [0, 2, 2]
    assert pattern.columns.tolist() == [2, 9]
    assert (pattern.q_heads, pattern.q_blocks) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, "block must be at least 1 token, got 0"),
        ({"block_starts": torch.tensor([0, 2, 3]).int()}, r"\[q_heads, q_blocks \+ 1\], got \[3"),
        ({"blocks": torch.tensor([0, 1, 1])}, "blocks must be torch.int32"),
        ({"blocks": torch.tensor([1, 1, 1]).int()}, "blocks must be at least 0 and ascend"),
        ({"blocks": torch.tensor([-1, 1, 1]).int()}, "blocks must be at least 0"),
        ({"block_starts": torch.tensor([[0, 2, 4]]).int()}, "of blocks must ascend from 0 to 3"),
        ({"block_starts": torch.tensor([[0, 4, 3]]).int()}, "of blocks must ascend"),
        ({"columns": torch.tensor([5, 4]).int()}, "columns must be at least 0 and ascend"),
        ({"column_starts": torch.tensor([0, 1]).int()}, "of columns must ascend from 0 to 2"),
        ({"window": torch.tensor([-3]).int()}, "window must not be negative, got -3"),
        ({"window": torch.tensor([3, 4]).int()}, r"window must be torch.int32 \[1\]"),
        ({"full": torch.tensor([1])}, r"full must be torch.bool \[1\]"),
    ],
)
def test_malformed_patterns_are_refused(changes: dict, message: str) -> None:
    fields = {
        "block": 4,
        "block_starts": torch.tensor([[0, 2, 3]]).int(),
        "blocks": torch.tensor([0, 1, 1]).int(),
        "column_starts": torch.tensor([0, 2]).int(),
        "columns": torch.tensor([4, 5]).int(),
    }
    SparsePattern(**fields)
    with pytest.raises(ValueError, match=message):
        SparsePattern(**fields | changes)


def test_heads_whose_lists_leave_a_gap_are_refused() -> None:
    starts = torch.tensor([[0, 1], [2, 3]]).int()
    nothing = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="without a gap"):
        SparsePattern(4, starts, torch.arange(3).int(), torch.zeros(3).int(), nothing)


@pytest.mark.parametrize(
    ("mask", "columns", "message"),
    [
        (torch.ones(2, 3), None, "mask must be torch.bool"),
        (torch.ones(2, 3, 3).bool(), [torch.arange(2)], "one tensor for each of 2 heads"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    mask: torch.Tensor, columns: list | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SparsePattern.from_blocks(mask, columns)


@pytest.mark.parametrize(
    ("indices", "counts", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 2).int(), "torch.int32 indices"),
        (torch.zeros(1, 2, 3).int(), torch.zeros(1, 3).int(), "got torch.int32"),
        (torch.zeros(1, 1, 3).int(), torch.tensor([[4]]).int(), "counts must lie in 0..3"),
        (torch.tensor([[[3, 3]]]).int(), torch.tensor([[2]]).int(), "ascend strictly"),
    ],
)
def test_malformed_token_lists_are_refused(
    indices: torch.Tensor, counts: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenList(indices, counts)
