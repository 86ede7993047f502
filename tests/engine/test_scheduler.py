"""The scheduler's promises: decodes never wait for prompts, pages are reserved before a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tamis import LLM, SamplingParams
from tamis.engine.engine import Engine
from tamis.errors import ConfigError, KVMemoryError, RequestError
from tamis.model import Model

LONG = SamplingParams(max_tokens=50, ignore_eos=True)


def make(model: Model, **settings: Any) -> Engine:
    defaults = {"kv_memory": "16MiB", "page_size": 8, "max_batch_tokens": 32}
    return LLM(model, **(defaults | settings)).engine


def prompt(n: int) -> list[int]:
    return [i % 250 for i in range(n)]


def test_a_decoding_sequence_gets_a_token_in_every_step_of_a_long_prefill(llama: Model) -> None:
    engine = make(llama)
    first = engine.add_request(prompt(3), LONG)
    engine.step()
    engine.add_request(prompt(300), LONG)
    for _ in range(300 // 32):
        assert [i.request_id for i in engine.step()] == [first]


def test_a_step_computes_at_most_max_batch_tokens(llama: Model) -> None:
    engine = make(llama, max_batch_tokens=20)
    for n in (50, 3, 17, 60):
        engine.add_request(prompt(n), LONG)
    while not engine.idle:
        stats = engine.stats
        before = stats.prefill_tokens + stats.decode_tokens
        engine.step()
        assert 0 < stats.prefill_tokens + stats.decode_tokens - before <= 20


def test_prompts_that_fit_share_a_step(llama: Model) -> None:
    engine = make(llama, max_batch_tokens=32)
    ids = [engine.add_request(prompt(n), LONG) for n in (10, 11, 11)]
    assert [i.request_id for i in engine.step()] == ids


def test_first_come_first_served(llama: Model) -> None:
    engine = make(llama, max_running=1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    ids = [engine.add_request(prompt(n), params) for n in (5, 9, 2)]
    finished = []
    while not engine.idle:
        finished += [i.request_id for i in engine.step() if i.output]
    assert finished == ids


def test_the_newest_gives_way(llama: Model) -> None:
    """Room for one grown request and a half: the older one never loses its pages."""
    room = make(llama).cache.required_bytes(56, chunk=8)
    engine = make(llama, kv_memory=room, max_batch_tokens=8)
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    ids = [engine.add_request(prompt(10), params), engine.add_request(prompt(10), params)]
    outputs = {}
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
    assert [outputs[i].metrics.preemptions > 0 for i in ids] == [False, True]


def test_requests_beyond_the_memory_wait_and_all_end(llama: Model) -> None:
    room = make(llama).cache.required_bytes(60, chunk=8)
    engine = make(llama, kv_memory=room, max_batch_tokens=8)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    for _ in range(12):
        engine.add_request(prompt(30), params)
    ended = 0
    while not engine.idle:
        ended += sum(i.finish_reason == "length" for i in engine.step())
        assert engine.cache.bytes_in_use <= room
    assert ended == 12
    assert engine.cache.bytes_in_use == 0


def test_abort_frees_the_pages_at_once_wherever_the_request_is(llama: Model) -> None:
    room = make(llama).cache.required_bytes(60, chunk=8)
    engine = make(llama, kv_memory=room, max_batch_tokens=8, preemption="swap", swap_memory="1MiB")
    ids = [engine.add_request(prompt(20), SamplingParams(max_tokens=38)) for _ in range(4)]
    scheduler = engine.scheduler
    while not (scheduler.running and scheduler.swapped and scheduler.waiting):
        engine.step()
    for request_id in reversed(ids):
        before = engine.cache.bytes_in_use + engine.cache.swap_bytes_in_use
        held = any(s.request.id == request_id for s in scheduler.running + scheduler.swapped)
        [last] = engine.abort(request_id)
        assert last.finish_reason == "abort"
        assert last.output is not None
        after = engine.cache.bytes_in_use + engine.cache.swap_bytes_in_use
        assert (after < before) == held
    assert engine.idle
    assert scheduler.idle
    assert engine.cache.bytes_in_use == engine.cache.swap_bytes_in_use == 0
    assert engine.abort(ids[0]) == []


def test_a_request_that_can_never_fit_is_refused_with_what_would_do(llama: Model) -> None:
    engine = make(llama, kv_memory="64KiB")
    with pytest.raises(KVMemoryError, match="kv_memory=") as refused:
        engine.add_request(prompt(400), LONG)
    enough = int(str(refused.value).split("kv_memory=")[1].split()[0])
    bigger = make(llama, kv_memory=enough)
    bigger.add_request(prompt(400), LONG)
    while not bigger.idle:
        last = bigger.step()
    assert last[-1].finish_reason == "length"


def test_memory_for_no_page_at_all_is_refused(llama: Model) -> None:
    with pytest.raises(KVMemoryError, match="the least is"):
        make(llama, kv_memory=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_tokens": 0}, "max_batch_tokens must be"),
        ({"page_size": -1}, "page_size must be"),
        ({"max_running": 1.5}, "max_running must be"),
        ({"preemption": "drop"}, "'recompute' or 'swap'"),
        ({"kv_memory": "4 gigs"}, "4 gigs"),
        ({"kv_memory": 1 << 50}, "has free"),
    ],
)
def test_wrong_settings_are_refused(llama: Model, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(llama, **settings)


@pytest.mark.parametrize(
    ("prompt_ids", "params", "message"),
    [
        ([], LONG, "empty"),
        (prompt(512), LONG, "context is 512"),
        ([5, 264], LONG, "264 is outside the vocabulary of 264"),
        ([-1], LONG, "outside the vocabulary"),
        ([5], SamplingParams(n=33), "n=33"),
        ([5], SamplingParams(stop_token_ids=[9999]), "9999"),
    ],
)
def test_wrong_requests_are_refused_and_leave_nothing_behind(
    llama: Model, prompt_ids: list[int], params: SamplingParams, message: str
) -> None:
    engine = make(llama)
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt_ids, params)
    assert engine.idle
    assert engine.scheduler.idle


def test_an_id_in_use_is_refused(llama: Model) -> None:
    engine = make(llama)
    engine.add_request([1], LONG, request_id="a")
    with pytest.raises(RequestError, match="in use"):
        engine.add_request([1], LONG, request_id="a")


def test_generation_ends_at_the_models_context(llama: Model) -> None:
    engine = make(llama)
    engine.add_request(prompt(500), SamplingParams(max_tokens=None, ignore_eos=True))
    while not engine.idle:
        last = engine.step()
    assert last[0].output is not None
    assert len(last[0].output.token_ids) == 12
    assert last[0].finish_reason == "length"


def test_a_failing_step_ends_its_requests_and_no_others(
    load: Callable[[str], Model], caplog: pytest.LogCaptureFixture
) -> None:
    """A hook on the model's own module raises once: the requests of that step report it."""
    model = load("qwen2")
    engine = make(model, max_batch_tokens=8)
    ids = [engine.add_request(prompt(8), LONG), engine.add_request(prompt(8), LONG)]

    def fail(*_: object) -> None:
        raise FloatingPointError("broken on purpose")

    hook = model.hf.register_forward_pre_hook(fail)
    [increment] = engine.step()
    hook.remove()
    assert increment.request_id == ids[0]
    assert increment.finish_reason == "error"
    assert "broken on purpose" in str(increment.error)
    assert "failed" in caplog.text
    while not engine.idle:
        last = engine.step()
    assert last[0].request_id == ids[1]
    assert last[0].finish_reason == "length"
    assert engine.cache.bytes_in_use == 0


def test_logits_that_are_not_finite_end_only_their_request(load: Callable[[str], Model]) -> None:
    model = load("qwen3")
    engine = make(model)
    ids = [engine.add_request([7, 7], LONG), engine.add_request([8, 8], LONG)]

    def poison(_: object, __: object, output: Any) -> None:
        output.logits[0, 0] = float("nan")

    hook = model.hf.register_forward_hook(poison)
    first, second = engine.step()
    hook.remove()
    assert (first.request_id, first.finish_reason) == (ids[0], "error")
    assert "not finite" in str(first.error)
    assert (second.request_id, second.finish_reason) == (ids[1], None)
