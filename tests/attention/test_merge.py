"""Merging attentions over disjoint sets of tokens gives attention over their union."""

from __future__ import annotations

import pytest
import torch

from tamis.attention import merge_states
from tamis.attention.merge import merge_sinks
from tests.attention import naive

NOTHING = -torch.inf


def state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries q [n, dim] over k, v [tokens, dim]: out [n, dim], lse [n]."""
    parts = [naive.attend(query, k, v, scale=0.3) for query in q]
    outs, lses = zip(*parts, strict=True)
    return torch.stack(outs).float(), torch.tensor(lses, dtype=torch.float32)


@pytest.mark.parametrize("cut", [0, 1, 13, 40])
def test_two_parts_make_the_whole(cut: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 8) * 4, torch.randn(40, 8), torch.randn(40, 8)
    out, lse = merge_states(*state(q, k[:cut], v[:cut]), *state(q, k[cut:], v[cut:]))
    want_out, want_lse = state(q, k, v)
    torch.testing.assert_close(out, want_out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-6)


def test_an_empty_side_leaves_the_other_as_it_is() -> None:
    torch.manual_seed(0)
    out, lse = torch.randn(4, 3, 8), torch.randn(4, 3) * 50
    garbage, empty = torch.full_like(out, torch.nan), torch.full_like(lse, NOTHING)
    for merged in (merge_states(out, lse, garbage, empty), merge_states(garbage, empty, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)


def test_two_empty_sides_are_empty() -> None:
    garbage, empty = torch.full((2, 8), torch.nan), torch.full((2,), NOTHING)
    out, lse = merge_states(garbage, empty, garbage, empty)
    assert torch.equal(out, torch.zeros(2, 8))
    assert torch.equal(lse, empty)


def test_the_dtype_of_the_first_side_is_kept() -> None:
    out, lse = torch.ones(2, 8, dtype=torch.bfloat16), torch.zeros(2)
    merged, total = merge_states(out, lse, 3 * out, lse)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, 2 * out)
    torch.testing.assert_close(total, torch.full((2,), 2.0).log())


def test_a_sink_takes_its_share_of_the_denominator() -> None:
    out, lse = torch.ones(3, 2, 8), torch.zeros(3, 2)
    lse[2] = NOTHING
    merged, total = merge_sinks(out, lse, torch.tensor([3.0]).log().expand(2))
    torch.testing.assert_close(merged[:2], torch.full((2, 2, 8), 0.25))
    assert torch.equal(merged[2], torch.zeros(2, 8))
    torch.testing.assert_close(total[:, 0].exp(), torch.tensor([4.0, 4.0, 3.0]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="of one shape on both sides"):
        merge_states(torch.zeros(2, 8), torch.zeros(2), torch.zeros(2, 8), torch.zeros(2, 1))


def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    states = [(torch.randn(37, 3, 8), torch.randn(37, 3) * 3) for _ in range(2)]
    together = merge_states(*states[0], *states[1])
    for row in range(37):
        own = slice(row, row + 1)
        alone = merge_states(*(x[own] for of_one in states for x in of_one))
        for mine, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(mine, all_of_them[own])
