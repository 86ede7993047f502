"""Who goes first: by arrival, by priority, by the service that users had."""

from __future__ import annotations

from typing import Any

import pytest

from tamis import LLM, SamplingParams
from tamis.engine.engine import Engine
from tamis.engine.order import ByPriority, FairShare, FirstCome, Order
from tamis.errors import ConfigError
from tamis.model import Model

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def make(model: Model, order: Order, **settings: Any) -> Engine:
    defaults = {"kv_bytes": 2**24, "page_size": 8, "max_batch_tokens": 32, "order": order}
    return Engine(model, **(defaults | settings))


def finished(engine: Engine) -> list[str]:
    """The requests in the order in which they end."""
    names = []
    while not engine.idle:
        names += [i.request_id for i in engine.step() if i.output is not None]
    return names


def test_the_smaller_priority_goes_first_and_equals_by_arrival(llama: Model) -> None:
    engine = make(llama, ByPriority(), max_running=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -3)):
        engine.add_request([1, 2, 3], SHORT, request_id=name, priority=priority)
    assert finished(engine) == ["d", "b", "a", "c"]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_an_urgent_request_takes_the_pages_of_others_which_end_as_they_would(
    preemption: str, llama: Model
) -> None:
    long = SamplingParams(max_tokens=30, ignore_eos=True)
    prompt = list(range(1, 60))
    alone = LLM(llama, kv_memory="16MiB").generate([prompt], long)[0].completions[0].token_ids
    room = make(llama, FirstCome()).cache.required_bytes(100, chunk=32)
    engine = make(llama, ByPriority(), kv_bytes=room, preemption=preemption, swap_bytes=2**24)
    engine.add_request(prompt, long, request_id="patient", priority=5)
    for _ in range(10):
        engine.step()
    engine.add_request(prompt, long, request_id="urgent", priority=0)
    outputs = {}
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output is not None}
    assert list(outputs) == ["urgent", "patient"]
    assert outputs["patient"].metrics.preemptions == 1
    assert outputs["urgent"].metrics.preemptions == 0
    assert [o.completions[0].token_ids for o in outputs.values()] == [alone, alone]


def test_first_come_lets_nobody_take_pages(llama: Model) -> None:
    engine = make(llama, FirstCome(), max_running=1)
    for name, priority in (("a", 1), ("b", 0)):
        engine.add_request([1, 2, 3], SHORT, request_id=name, priority=priority)
    assert finished(engine) == ["a", "b"]


def test_a_user_with_one_request_does_not_wait_for_anothers_ten(llama: Model) -> None:
    engine = make(llama, FairShare(), max_running=1)
    for i in range(10):
        engine.add_request([1, 2, 3], SHORT, request_id=f"greedy-{i}", user="greedy")
    engine.step()
    engine.add_request([1, 2, 3], SHORT, request_id="modest", user="modest")
    assert finished(engine).index("modest") == 1


def test_service_is_counted_in_prompt_and_output_tokens(llama: Model) -> None:
    """One long prompt, or many outputs, and the other user's short requests come first."""
    engine = make(llama, FairShare(output_weight=3.0), max_running=1)
    engine.add_request(list(range(1, 31)), SHORT, request_id="reads", user="reader")
    engine.add_request(
        [1], SamplingParams(max_tokens=8, ignore_eos=True), request_id="writes", user="writer"
    )
    for i in range(2):
        engine.add_request([1, 2], SHORT, request_id=f"reads-{i}", user="reader")
        engine.add_request([1, 2], SHORT, request_id=f"writes-{i}", user="writer")
    # 30 + 3 * 3 = 39 tokens of service against 1 + 3 * 7 = 22, then 11 more for each request.
    assert finished(engine) == ["reads", "writes", "writes-0", "writes-1", "reads-0", "reads-1"]


def test_nobody_saves_service_up_by_staying_away(llama: Model) -> None:
    engine = make(llama, FairShare(), max_running=1)
    for i in range(6):
        engine.add_request([1] * 20, SHORT, request_id=f"a{i}", user="a")
    for _ in range(4):
        engine.step()
    for i in range(6):
        engine.add_request([1] * 20, SHORT, request_id=f"b{i}", user="b")
    names = finished(engine)
    assert 3 <= [name[0] for name in names[:8]].count("a") <= 5


def test_a_heavy_user_gives_way_when_the_quantum_is_used_up(llama: Model) -> None:
    engine = make(llama, FairShare(quantum=20), max_running=1)
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    engine.add_request([1] * 30, long, request_id="long", user="heavy")
    for _ in range(3):
        engine.step()
    engine.add_request([1, 2], SHORT, request_id="short", user="light")
    assert finished(engine) == ["short", "long"]


@pytest.mark.parametrize("wrong", [{"output_weight": 0}, {"quantum": -1}])
def test_a_fair_share_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        FairShare(**wrong)
