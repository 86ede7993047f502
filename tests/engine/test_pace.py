"""How many prompt tokens join a step in which others decode."""

from __future__ import annotations

import pytest

from tamis import SamplingParams
from tamis.engine.engine import Engine
from tamis.engine.pace import Costs, Full, Steady
from tamis.errors import ConfigError
from tamis.model import Model


def costs(decode_s: float, prompt_token_s: float) -> Costs:
    return Costs(decode_s, prompt_token_s)


def test_full_takes_the_whole_budget() -> None:
    assert Full().prompt_tokens(Costs(), 7, 2048) == 2048


def test_steady_takes_what_keeps_the_step_within_the_slowdown() -> None:
    pace = Steady(slowdown=2.5)
    assert pace.prompt_tokens(costs(0.010, 0.0001), 4, 2048) == 150
    assert pace.prompt_tokens(costs(0.010, 0.0001), 4, 100) == 100


def test_steady_lets_prompts_have_all_while_nobody_decodes() -> None:
    assert Steady().prompt_tokens(costs(0.010, 0.1), 0, 2048) == 2048


def test_steady_is_careful_while_it_knows_nothing_and_never_stops_a_prompt() -> None:
    assert Steady().prompt_tokens(Costs(), 1, 2048) == 4
    assert Steady().prompt_tokens(costs(1e-6, 1.0), 1, 2048) == 4
    assert Steady().prompt_tokens(costs(1e-6, 1.0), 1, 3) == 3


def test_costs_follow_what_steps_take() -> None:
    learned = Costs()
    for _ in range(50):
        learned.observe(0.010, 4, 0)
        learned.observe(0.030, 4, 100)
    assert learned.decode_s == pytest.approx(0.010)
    assert learned.prompt_token_s == pytest.approx(0.0002)
    for _ in range(50):
        learned.observe(0.100, 0, 100)
    assert learned.prompt_token_s == pytest.approx(0.001, rel=0.01)


def test_a_step_quicker_than_its_decodes_alone_does_not_make_prompts_free() -> None:
    learned = Costs(decode_s=0.010)
    learned.observe(0.008, 4, 10)
    assert learned.prompt_token_s == pytest.approx(0.00008)


@pytest.mark.parametrize("slowdown", [1.0, 0, float("nan")])
def test_a_slowdown_that_leaves_no_time_is_refused(slowdown: float) -> None:
    with pytest.raises(ConfigError, match="more than 1"):
        Steady(slowdown)


def test_prompts_come_in_small_chunks_beside_decodes_and_whole_alone(llama: Model) -> None:
    engine = Engine(llama, kv_bytes=2**24, page_size=8, max_batch_tokens=256, pace=Steady(1.5))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    engine.add_request([1, 2, 3], params)
    for _ in range(4):
        engine.step()
    engine.scheduler.costs = costs(0.010, 0.000125)  # 40 tokens
    engine.add_request([1] * 200, params)
    before = engine.stats.prefill_tokens
    engine.step()
    assert engine.stats.prefill_tokens - before == 40
    while not engine.idle:
        engine.step()
    engine.add_request([1] * 200, params)
    before = engine.stats.prefill_tokens
    engine.step()
    assert engine.stats.prefill_tokens - before == 200


def test_a_step_that_was_kept_waiting_decides_nothing() -> None:
    learned = Costs()
    for _ in range(30):
        learned.observe(0.010, 4, 0)
        learned.observe(0.030, 4, 100)
    calm = Steady().prompt_tokens(learned, 4, 2048)
    learned.observe(5.0, 4, 0)
    learned.observe(5.0, 4, 100)
    assert learned.decode_s == pytest.approx(0.012, rel=0.05)
    assert learned.prompt_token_s == pytest.approx(0.00024, rel=0.05)
    assert Steady().prompt_tokens(learned, 4, 2048) == pytest.approx(calm, rel=0.1)
    for _ in range(30):  # but a change that stays is followed
        learned.observe(0.100, 4, 0)
    assert learned.decode_s == pytest.approx(0.100, rel=0.05)
