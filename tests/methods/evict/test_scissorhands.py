"""Scissorhands drops the least pivotal tokens of a full cache in bulk."""

from __future__ import annotations

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.evict.scissorhands import Scissorhands
from tests.methods.evict.random_layer import best, decide, random_layer
from tests.methods.layer import NaiveLayerView


def counts(view: NaiveLayerView, head: int, history: int) -> list[float]:
    """How often each token of a head got less than the average, by the definition."""
    weights = view.window(history)
    newest = int(view.positions.max())
    group = len(weights) // len(view.lengths)
    low = [0.0] * int(view.lengths[head])
    for query in range(weights.shape[1]):
        time = newest - weights.shape[1] + 1 + query
        seen = [i for i in range(len(low)) if view.positions[head, i] <= time]
        for q_head in range(head * group, (head + 1) * group):
            for i in seen:
                low[i] += float(weights[q_head, query, i]) < 1 / len(seen)
    return low


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("history", [5, 400])
@pytest.mark.parametrize("dropped", [(), (2, 9)])
def test_a_full_head_keeps_recent_tokens_and_those_seldom_below_average(
    seed: int, history: int, dropped: tuple[int, ...]
) -> None:
    view = random_layer(seed, dropped=dropped)
    kept = decide(Scissorhands(history=history, recent=4, drop=0.25), view, [16, 24])
    for head, left in enumerate([12, 18]):
        length = int(view.lengths[head])
        newest = set(range(length - 4, length))
        score = [-c for c in counts(view, head, history)]
        older = [-1e9 if i in newest else score[i] for i in range(length)]
        assert set(kept[head].nonzero().flatten().tolist()) == newest | best(older, left - 4)


def test_a_head_within_its_budget_keeps_all_while_a_full_one_loses_the_bulk() -> None:
    view = random_layer(3, dropped=(0, 15))
    assert decide(Scissorhands(), view, [30, 30]).sum(1).tolist() == [15, 25]


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_a_budget_that_holds_everything_keeps_everything(tokens: int) -> None:
    view = random_layer(4, tokens)
    assert (decide(Scissorhands(), view, tokens) == view.cached).all()


def test_a_small_budget_keeps_the_newest_tokens() -> None:
    kept = decide(Scissorhands(), random_layer(5), 8)
    assert kept.nonzero()[:, 1].tolist() == [36, 37, 38, 39] * 2


def test_equal_attention_is_not_below_average() -> None:
    view = random_layer(6)
    view.k = torch.zeros_like(view.k)
    scores = Scissorhands(history=1, recent=1).scores(view)
    assert scores[:, -1].isposinf().all()
    assert (scores[:, :-1] == scores[:, :1]).all()


def test_it_needs_its_history_and_acts_in_chunks_and_steps() -> None:
    assert Scissorhands(history=50).needs().queries == 50
    assert (Scissorhands.per_chunk, Scissorhands(interval=5).interval) == (True, 5)


@pytest.mark.parametrize(
    "wrong", [{"history": 0}, {"recent": 0}, {"drop": 1.5}, {"interval": 0}, {"budget": 2.0}]
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="must be"):
        Scissorhands(**wrong)
