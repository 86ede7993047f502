"""SqueezeAttention moves budget away from layers that change little."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.budget.squeezeattention import SqueezeAttention, most_similar
from tests.methods.budget.random_model import budgets, random_model

SIMILAR = (0.2, 0.91, 0.5, 0.25, 0.9, 0.55)
"""Three groups, of which layers 1 and 4 are the most similar."""


def test_the_most_similar_layers_keep_p_and_the_others_share_what_is_saved() -> None:
    views = random_model(0, prompt_tokens=400, kv_heads=(2,) * 6, similarity=SIMILAR)
    allocated = SqueezeAttention(p=0.4).allocate(budgets(views, 100), views, [])
    assert allocated.tolist() == [
        [130, 130],
        [40, 40],
        [130, 130],
        [130, 130],
        [40, 40],
        [130, 130],
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [3, 4, 7])
def test_groups_have_the_least_spread_of_all_groupings(seed: int, n: int) -> None:
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    best, expected = float("inf"), None
    for grouping in product(range(3), repeat=n):
        groups = [
            [float(v) for v, g in zip(values, grouping, strict=True) if g == i] for i in range(3)
        ]
        if not all(groups):
            continue
        means = [sum(group) / len(group) for group in groups]
        spread = sum((v - m) ** 2 for group, m in zip(groups, means, strict=True) for v in group)
        if spread < best - 1e-12:
            highest = means.index(max(means))
            best, expected = spread, [g == highest for g in grouping]
    assert most_similar(values).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_sum_stays_with_windows_and_uneven_heads(seed: int) -> None:
    views = random_model(seed, kv_heads=(2, 4, 1, 3), windows=(None, 6, None, 40))
    budget = budgets(views, 17)
    allocated = SqueezeAttention().allocate(budget, views, [])
    assert allocated.sum() == (2 + 1 + 3) * 17 + 4 * 6, "a window of 6 can use no more"
    assert (allocated[budget > 0] >= 1).all()
    assert (allocated[budget == 0] == 0).all()
    assert (allocated[1] <= 6).all()


@pytest.mark.parametrize("tokens", [48, 60])
def test_a_budget_that_holds_everything_stays(tokens: int) -> None:
    views = random_model(1)
    assert (SqueezeAttention().allocate(budgets(views, tokens), views, []) == tokens).all()


@pytest.mark.parametrize("similarity", [(0.5, 0.9), (0.7,) * 5])
def test_too_few_or_equal_layers_are_left_alone(similarity: tuple[float, ...]) -> None:
    views = random_model(2, kv_heads=(2,) * len(similarity), similarity=similarity)
    assert (SqueezeAttention().allocate(budgets(views, 9), views, []) == 9).all()


def test_it_needs_the_similarity_of_hidden_states() -> None:
    assert SqueezeAttention().needs().similarity


@pytest.mark.parametrize("p", [0.0, 1.2])
def test_p_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(PlanError, match="must be"):
        SqueezeAttention(p=p)
