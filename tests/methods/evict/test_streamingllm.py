"""StreamingLLM keeps the first tokens and the newest."""

from __future__ import annotations

import pytest

from tamis.errors import PlanError
from tamis.methods.evict.streamingllm import StreamingLLM
from tests.methods.evict.random_layer import decide, kept_positions, random_layer


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("budget", [7, 20, 39])
def test_it_keeps_sinks_and_the_newest_tokens(sinks: int, budget: int) -> None:
    view = random_layer(0)
    expected = [*range(sinks), *range(40 - (budget - sinks), 40)]
    kept = decide(StreamingLLM(sinks=sinks), view, budget)
    assert kept_positions(view, kept) == [expected, expected]


def test_sinks_are_the_texts_first_tokens_and_not_the_caches() -> None:
    view = random_layer(1, dropped=(5, 11))
    for head, positions in enumerate(kept_positions(view, decide(StreamingLLM(), view, 9))):
        cached = view.positions[head][view.cached[head]].tolist()
        sinks = [p for p in cached if p < 4]
        assert positions == sinks + cached[len(cached) - (9 - len(sinks)) :]


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_budget_that_holds_everything_keeps_everything(tokens: int) -> None:
    view = random_layer(2, tokens)
    assert (decide(StreamingLLM(), view, tokens) == view.cached).all()


def test_heads_may_have_budgets_of_their_own() -> None:
    view = random_layer(3)
    assert decide(StreamingLLM(), view, [10, 25]).sum(1).tolist() == [10, 25]


def test_it_evicts_in_chunks_and_at_every_token_with_positions_within_the_cache() -> None:
    method = StreamingLLM()
    assert (method.per_chunk, method.interval, method.in_cache_positions) == (True, 1, True)
    assert not StreamingLLM(in_cache=False).in_cache_positions
    assert StreamingLLM(interval=8).interval == 8


@pytest.mark.parametrize(
    "wrong", [{"sinks": -1}, {"interval": 0}, {"budget": 4}, {"budget": 8, "sinks": 8}]
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="must be"):
        StreamingLLM(**wrong)
