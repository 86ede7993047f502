"""Head-adaptive budgets follow the scores within each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.budget.headadaptive import HeadAdaptive
from tests.methods.budget.random_model import budgets, random_model, random_scores


def expected(scores: Tensor, budget: int, safeguard: float) -> list[float]:
    """Algorithm 1 for one layer without ties: (head, score) pairs sorted, the best counted."""
    stay = scores.isposinf().sum(1).tolist()
    free = [budget - n for n in stay]
    ranked = sorted(
        ((float(s), head) for head, row in enumerate(scores) for s in row if s < float("inf")),
        reverse=True,
    )
    counts = [0] * len(scores)
    for _, head in ranked[: sum(free)]:
        counts[head] += 1
    return [
        s + safeguard * f + (1 - safeguard) * c for s, f, c in zip(stay, free, counts, strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("safeguard", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("protected", [0, 4])
def test_heads_get_tokens_by_their_top_scores(seed: int, safeguard: float, protected: int) -> None:
    views = random_model(seed, kv_heads=(2, 4, 3))
    scores = random_scores(views, seed)
    for score in scores:
        score[:, len(score[0]) - protected :] = torch.inf
    allocated = HeadAdaptive(safeguard=safeguard).allocate(budgets(views, 16), views, scores)
    for row, score in zip(allocated, scores, strict=True):
        got = row[: len(score)].tolist()
        assert sum(got) == 16 * len(score)
        for tokens, wanted in zip(got, expected(score, 16, safeguard), strict=True):
            assert abs(tokens - wanted) < 1


def test_a_head_without_any_high_score_keeps_its_safeguard() -> None:
    views = random_model(0, kv_heads=(2,))
    scores = [torch.stack([torch.rand(48) + 5, torch.rand(48)])]
    assert HeadAdaptive().allocate(budgets(views, 20), views, scores).tolist() == [[36, 4]]


def test_equal_scores_change_nothing() -> None:
    views = random_model(1, kv_heads=(3, 3))
    scores = [torch.zeros(3, 48)] * 2
    assert (HeadAdaptive().allocate(budgets(views, 11), views, scores) == 11).all()


@pytest.mark.parametrize("seed", range(3))
def test_every_layer_keeps_its_sum_with_windows_and_uneven_heads(seed: int) -> None:
    views = random_model(seed, kv_heads=(2, 4, 1, 3), windows=(None, 6, None, 40))
    budget = budgets(views, 17)
    allocated = HeadAdaptive().allocate(budget, views, random_scores(views, seed))
    assert allocated.sum(1).tolist() == [34, 24, 17, 51]
    assert (allocated[budget == 0] == 0).all()


@pytest.mark.parametrize("tokens", [48, 60])
def test_a_budget_that_holds_everything_stays(tokens: int) -> None:
    views = random_model(2)
    allocated = HeadAdaptive().allocate(budgets(views, tokens), views, random_scores(views, 2))
    assert (allocated == tokens).all()


def test_more_protected_tokens_than_budget_leave_the_heads_equal() -> None:
    views = random_model(3, kv_heads=(2,))
    scores = [torch.full((2, 48), torch.inf)]
    assert HeadAdaptive().allocate(budgets(views, 5), views, scores).tolist() == [[5, 5]]


def test_what_is_not_cached_does_not_count() -> None:
    views = random_model(4, kv_heads=(2,))
    views[0].lengths = torch.tensor([48, 3])
    scores = [torch.stack([torch.rand(48), torch.rand(48) + 5])]
    allocated = HeadAdaptive(safeguard=0.0).allocate(budgets(views, 10), views, scores)
    assert allocated.tolist() == [[17, 3]]


@pytest.mark.parametrize("safeguard", [-0.1, 1.1])
def test_a_safeguard_out_of_range_is_refused(safeguard: float) -> None:
    with pytest.raises(PlanError, match="must be"):
        HeadAdaptive(safeguard=safeguard)
