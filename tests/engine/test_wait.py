"""How long a request is expected to wait for its first token."""

from __future__ import annotations

from typing import Any

import pytest

from tamis import SamplingParams
from tamis.engine.engine import Engine
from tamis.engine.order import ByPriority, FairShare
from tamis.engine.pace import Costs, Full, Steady
from tamis.engine.wait import prefill_s
from tamis.model import Model

LONG = SamplingParams(max_tokens=100, ignore_eos=True)
TOKEN_S = 0.001


def make(model: Model, **settings: Any) -> Engine:
    """An engine in which a prompt token takes 1 ms, and a step that only decodes 10 ms."""
    engine = Engine(model, kv_bytes=2**24, page_size=8, max_batch_tokens=64, **settings)
    engine.scheduler.costs = Costs(0.010, TOKEN_S)
    return engine


def waits(engine: Engine, *requests: dict[str, Any]) -> list[float]:
    """What is expected of requests when each of them has come in."""
    return [engine.expected_wait_s(engine.add_request(**{"params": LONG, **r})) for r in requests]


def test_nothing_is_expected_before_anything_was_measured() -> None:
    assert prefill_s(Costs(), Full(), 10_000, 3, 2048) == 0


def test_alone_a_prompt_takes_what_its_tokens_cost() -> None:
    assert prefill_s(Costs(0.010, TOKEN_S), Steady(2), 500, 0, 2048) == pytest.approx(0.5)


def test_beside_decodes_every_step_costs_a_decode_too() -> None:
    costs = Costs(0.010, TOKEN_S)
    # At most twice as slow: 10 tokens to a step, of which 50 are needed.
    assert prefill_s(costs, Steady(2), 500, 4, 2048) == pytest.approx(0.5 + 50 * 0.010)
    assert prefill_s(costs, Full(), 500, 4, 104) == pytest.approx(0.5 + 5 * 0.010)


def test_prompts_queue_one_behind_the_other(llama: Model) -> None:
    engine = make(llama)
    expected = waits(engine, *({"prompt_ids": [1] * n} for n in (100, 200, 30)))
    assert expected == pytest.approx([0.100, 0.300, 0.330])
    engine.step()  # 64 of them
    [after] = waits(engine, {"prompt_ids": [1] * 10})
    # The costs have learned from that step.
    costs = engine.scheduler.costs
    assert after == pytest.approx(prefill_s(costs, Full(), 276, 0, 64))


def test_who_is_urgent_waits_for_those_alone_who_are_as_urgent(llama: Model) -> None:
    engine = make(llama, order=ByPriority())
    expected = waits(
        engine,
        {"prompt_ids": [1] * 200, "priority": 5},
        {"prompt_ids": [1] * 40, "priority": 0},
        {"prompt_ids": [1] * 20, "priority": 0},
        {"prompt_ids": [1] * 10, "priority": 9},
    )
    assert expected == pytest.approx([0.200, 0.040, 0.060, 0.270])


def test_a_fair_share_waits_for_as_much_of_others_as_of_its_own(llama: Model) -> None:
    engine = make(llama, order=FairShare())
    crowd = [{"prompt_ids": [1] * 100, "user": "greedy"}] * 4
    assert waits(engine, *crowd)[-1] == pytest.approx(0.400)
    modest = {"prompt_ids": [1] * 50, "user": "modest"}
    assert waits(engine, modest, modest) == pytest.approx([0.100, 0.200])


def test_what_is_cached_costs_nothing(llama: Model) -> None:
    engine = make(llama, prefix_cache=True)
    prompt = [7] * 90
    engine.add_request(prompt, SamplingParams(max_tokens=1))
    while not engine.idle:
        engine.step()
    engine.scheduler.costs = Costs(0.010, TOKEN_S)
    [again] = waits(engine, {"prompt_ids": prompt})
    assert again == pytest.approx(TOKEN_S * (90 - 88))
    [behind] = waits(engine, {"prompt_ids": [9] * 10})
    assert behind == pytest.approx(TOKEN_S * 12)


def test_a_context_costs_nothing_once_it_is_there(llama: Model) -> None:
    engine = make(llama)
    book = engine.add_context([7] * 100)
    assert engine.expected_wait_s(book) == pytest.approx(0.100)
    while not engine.idle:
        engine.step()
    engine.scheduler.costs = Costs(0.010, TOKEN_S)
    [expected] = waits(engine, {"prompt_ids": [1] * 5, "context": book})
    assert expected == pytest.approx(0.005)


def test_who_decodes_has_no_prompt_left(llama: Model) -> None:
    engine = make(llama)
    engine.add_request([1] * 50, LONG)
    for _ in range(5):
        engine.step()
    engine.scheduler.costs = Costs(0.010, TOKEN_S)
    [expected] = waits(engine, {"prompt_ids": [1] * 63})
    assert expected == pytest.approx(0.063 + 0.010)
