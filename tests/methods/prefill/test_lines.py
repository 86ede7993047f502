"""Columns, diagonals and blocks of a chunk's map of attention."""

from __future__ import annotations

import pytest
import torch

from tamis.methods.prefill.lines import Grid, line_sums
from tests.methods.prefill.random_chunk import lines, past_of, random_chunk

CHUNKS = [(12, (0, 0)), (13, (4, 4)), (9, (0, 7)), (1, (5, 2)), (3, (0, 0))]


@pytest.mark.parametrize(("tokens", "past"), CHUNKS)
@pytest.mark.parametrize("last_q", [1, 4, 40])
def test_lines_are_summed_pair_by_pair(tokens: int, past: tuple[int, ...], last_q: int) -> None:
    view = random_chunk(0, tokens, past)
    columns, diagonals = line_sums(view.window(last_q), Grid.of(view, 4).keys)
    for head in range(view.q.shape[1]):
        expected = lines(view, head, last_q)
        for got, values in zip((columns, diagonals), expected, strict=True):
            torch.testing.assert_close(got[head, : len(values)], torch.tensor(values))
            assert (got[head, len(values) :] == 0).all()


@pytest.mark.parametrize(("tokens", "past"), CHUNKS)
def test_blocks_are_crossed_where_a_pair_of_the_diagonal_lies(
    tokens: int, past: tuple[int, ...]
) -> None:
    view = random_chunk(1, tokens, past)
    grid = Grid.of(view, 4)
    offsets = torch.rand(view.q.shape[1], int(grid.keys.max())) < 0.15
    expected = [torch.zeros_like(grid.visible) for _ in range(3)]
    for head in range(view.q.shape[1]):
        for query in range(tokens):
            own = past_of(view, head) + query
            expected[1][head, query // 4, own // 4] = True
            for key in range(own + 1):
                expected[0][head, query // 4, key // 4] |= offsets[head, own - key]
                expected[2][head, query // 4, key // 4] = True
    assert torch.equal(grid.crossed(offsets), expected[0])
    assert torch.equal(grid.diagonal, expected[1])
    assert torch.equal(grid.visible, expected[2])
