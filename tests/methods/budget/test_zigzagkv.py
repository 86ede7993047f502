"""ZigZagKV gives more to layers whose attention is spread."""

from __future__ import annotations

import pytest

from tamis.errors import PlanError
from tamis.methods.budget.zigzagkv import ZigZagKV
from tests.methods.budget.random_model import budgets, random_model
from tests.methods.layer import NaiveLayerView


def lmba(view: NaiveLayerView, threshold: float, window: int) -> float:
    """Mean over query heads of the fewest tokens that hold the threshold."""
    needed = []
    for weights in view.window(window):
        mean = sorted((weights.sum(0) / weights.shape[0]).tolist(), reverse=True)
        held = count = 0
        while held < threshold and count < len(mean):
            held += mean[count]
            count += 1
        needed.append(count)
    return sum(needed) / len(needed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("threshold", "minimum"), [(0.9, 0.5), (0.6, 0.2), (0.8, 0.0)])
def test_budgets_are_the_minimum_and_a_share_by_uncertainty(
    seed: int, threshold: float, minimum: float
) -> None:
    views = random_model(seed, prompt_tokens=60)
    method = ZigZagKV(threshold=threshold, minimum=minimum, window=5)
    allocated = method.allocate(budgets(views, 20), views, [])
    need = [lmba(view, threshold, 5) for view in views]
    for row, layer_need in zip(allocated.tolist(), need, strict=True):
        share = layer_need / sum(need) * (1 - minimum) * 20 * len(views)
        assert all(abs(tokens - (minimum * 20 + share)) < 1 for tokens in row)
    assert allocated.sum() == 20 * 8
    assert len(set(allocated[:, 0].tolist())) > 1, "the layers differ"


def test_a_layer_with_spread_attention_gets_more_than_one_with_sharp() -> None:
    views = random_model(3, sharpness=(9, 0.1, 9, 9))
    allocated = ZigZagKV().allocate(budgets(views, 10), views, [])
    assert allocated[1].min() > allocated[[0, 2, 3]].max()


@pytest.mark.parametrize("seed", range(3))
def test_the_sum_stays_with_windows_and_uneven_heads(seed: int) -> None:
    views = random_model(seed, kv_heads=(2, 4, 1, 3), windows=(None, 6, None, 40))
    budget = budgets(views, 17)
    allocated = ZigZagKV().allocate(budget, views, [])
    assert allocated.sum() == (2 + 1 + 3) * 17 + 4 * 6, "a window of 6 can use no more"
    assert (allocated[budget > 0] >= 1).all()
    assert (allocated[budget == 0] == 0).all()


@pytest.mark.parametrize("tokens", [48, 60])
def test_a_budget_that_holds_everything_stays(tokens: int) -> None:
    views = random_model(4)
    assert (ZigZagKV().allocate(budgets(views, tokens), views, []) == tokens).all()


def test_a_minimum_of_all_changes_nothing() -> None:
    views = random_model(5)
    assert (ZigZagKV(minimum=1.0).allocate(budgets(views, 7), views, []) == 7).all()


def test_a_prompt_of_one_token_keeps_it() -> None:
    views = random_model(6, prompt_tokens=1)
    assert (ZigZagKV(threshold=1.0).allocate(budgets(views, 1), views, []) == 1).all()


def test_it_needs_its_window() -> None:
    assert ZigZagKV(window=8).needs().queries == 8
    assert ZigZagKV.query_dependent


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"minimum": 1.5}, {"window": 0}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="must be"):
        ZigZagKV(**wrong)
