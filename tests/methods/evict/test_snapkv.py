"""SnapKV keeps what the prompt's last queries attend to, in clusters."""

from __future__ import annotations

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.evict.snapkv import SnapKV
from tests.methods.evict.random_layer import best, decide, kept_positions, random_layer
from tests.methods.layer import NaiveLayerView


def importance(view: NaiveLayerView, head: int, method: SnapKV) -> list[float]:
    """Pooled attention to the tokens before the window, averaged over query heads."""
    weights = view.window(method.window)
    group = len(weights) // len(view.lengths)
    past = max(0, int(view.lengths[head]) - method.window)
    reach = method.kernel // 2
    total = [0.0] * past
    for q_head in range(head * group, (head + 1) * group):
        sums = weights[q_head].sum(0).tolist()[:past]
        for i in range(past):
            near = sums[max(0, i - reach) : i + reach + 1]
            pooled = max(near) if method.pooling == "max" else sum(near) / method.kernel
            total[i] += pooled / group
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("dropped", [(), (7, 2)])
def test_scores_are_pooled_window_attention(
    seed: int, pooling: str, kernel: int, dropped: tuple[int, ...]
) -> None:
    view = random_layer(seed, dropped=dropped, group=3)
    method = SnapKV(window=5, kernel=kernel, pooling=pooling)
    scores = method.scores(view)
    for head, length in enumerate(view.lengths.tolist()):
        expected = torch.tensor(importance(view, head, method))
        torch.testing.assert_close(scores[head, : length - 5], expected)
        assert scores[head, length - 5 : length].isposinf().all()


@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_the_window_and_the_best_before_it(seed: int) -> None:
    view = random_layer(seed, dropped=(4, 0))
    method = SnapKV(window=6, kernel=1)  # without ties
    kept = decide(method, view, [11, 17])
    for head, budget in enumerate([11, 17]):
        length = int(view.lengths[head])
        expected = best(importance(view, head, method), budget - 6)
        expected |= set(range(length - 6, length))
        assert set(kept[head].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("tokens", [1, 5, 32, 40])
def test_a_budget_that_holds_everything_keeps_everything(tokens: int) -> None:
    view = random_layer(4, tokens)
    assert (decide(SnapKV(), view, tokens) == view.cached).all()


def test_a_budget_below_the_window_keeps_the_newest_tokens() -> None:
    view = random_layer(5)
    assert kept_positions(view, decide(SnapKV(), view, 3)) == [[37, 38, 39]] * 2


def test_equal_scores_keep_the_earlier_tokens() -> None:
    view = random_layer(6)
    view.k = torch.zeros_like(view.k)
    kept = decide(SnapKV(window=4, kernel=1), view, 6)
    assert kept_positions(view, kept) == [[0, 1, 36, 37, 38, 39]] * 2


def test_it_acts_once_after_the_prompt_on_its_last_queries() -> None:
    method = SnapKV(window=16)
    assert method.needs().queries == 16
    assert (method.per_chunk, method.interval, method.query_dependent) == (False, None, True)


@pytest.mark.parametrize(
    "wrong",
    [{"window": 0}, {"kernel": 4}, {"pooling": "sum"}, {"budget": 32}, {"budget": 1.5}],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="must be"):
        SnapKV(**wrong)
