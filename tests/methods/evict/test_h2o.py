"""H2O keeps recent tokens and heavy hitters."""

from __future__ import annotations

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.evict.h2o import H2O
from tests.methods.evict.random_layer import best, decide, kept_positions, random_layer


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heavy", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dropped", [(), (3, 17)])
def test_it_keeps_recent_tokens_and_the_highest_sums(
    seed: int, heavy: float, dropped: tuple[int, ...]
) -> None:
    view = random_layer(seed, dropped=dropped)
    kept = decide(H2O(heavy=heavy), view, [10, 15])
    for head, budget in enumerate([10, 15]):
        length = int(view.lengths[head])
        hitters = round(heavy * budget)
        newest = set(range(length - (budget - hitters), length))
        sums = view.attention()[head].tolist()
        older = [-1.0 if i in newest else sums[i] for i in range(length)]
        assert set(kept[head].nonzero().flatten().tolist()) == newest | best(older, hitters)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_budget_that_holds_everything_keeps_everything(tokens: int) -> None:
    view = random_layer(4, tokens)
    assert (decide(H2O(), view, tokens) == view.cached).all()


def test_a_budget_of_one_token_keeps_one() -> None:
    assert decide(H2O(), random_layer(5), 1).sum(1).tolist() == [1, 1]


def test_equal_sums_keep_the_earlier_tokens() -> None:
    view = random_layer(6, attention=torch.ones(2, 40))
    assert kept_positions(view, decide(H2O(), view, 6)) == [[0, 1, 2, 37, 38, 39]] * 2


def test_it_needs_attention_sums_and_acts_in_chunks_and_steps() -> None:
    assert H2O().needs().attention
    assert (H2O.per_chunk, H2O.query_dependent, H2O(interval=16).interval) == (True, True, 16)


@pytest.mark.parametrize("wrong", [{"heavy": 1.1}, {"heavy": -0.1}, {"interval": 0}, {"budget": 0}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="must be"):
        H2O(**wrong)
