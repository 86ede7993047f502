"""Apportioning keeps the sum and the bounds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.methods.budget.apportion import apportion, bounds
from tests.methods.budget.random_model import budgets, random_model

heads = st.lists(
    st.tuples(st.floats(0, 100), st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=12
)


@given(heads, st.integers(0, 500))
def test_parts_add_up_within_their_bounds(parts: list[tuple[float, int, int]], total: int) -> None:
    wanted = torch.tensor([want for want, _, _ in parts])
    smallest = torch.tensor([low for _, low, _ in parts])
    largest = smallest + torch.tensor([more for _, _, more in parts])
    given_out = apportion(wanted, total, smallest, largest)
    assert (given_out >= smallest).all()
    assert (given_out <= largest).all()
    assert given_out.sum() == min(max(total, int(smallest.sum())), int(largest.sum()))


def test_whole_wishes_that_add_up_are_granted() -> None:
    wanted = torch.tensor([[3.0, 9.0], [0.0, 4.0]])
    zero, many = torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 99)
    assert apportion(wanted, 16, zero, many).tolist() == [[3, 9], [0, 4]]


def test_what_one_cannot_use_goes_to_the_others_in_proportion() -> None:
    wanted = torch.tensor([60.0, 20.0, 10.0])
    largest = torch.tensor([30, 99, 99])
    assert apportion(wanted, 90, torch.zeros(3, dtype=torch.int64), largest).tolist() == [
        30,
        40,
        20,
    ]


def test_fractions_go_to_the_largest_remainders() -> None:
    wanted = torch.tensor([1.2, 1.7, 1.1])
    zero, many = torch.zeros(3, dtype=torch.int64), torch.full((3,), 99)
    assert apportion(wanted, 4, zero, many).tolist() == [1, 2, 1]


def test_bounds_are_the_prompt_and_the_sliding_window() -> None:
    views = random_model(0, prompt_tokens=48, kv_heads=(2, 1, 2), windows=(None, 8, 64))
    usable, largest = bounds(budgets(views, 20), views)
    assert usable.tolist() == [[20, 20], [8, 0], [20, 20]]
    assert largest.tolist() == [[48, 48], [8, 0], [48, 48]]


def test_a_budget_beyond_the_prompt_cannot_grow() -> None:
    views = random_model(0, prompt_tokens=12, kv_heads=(2, 2))
    usable, largest = bounds(budgets(views, 20), views)
    assert usable.tolist() == largest.tolist() == [[20, 20], [20, 20]]
