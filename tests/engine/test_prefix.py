"""Requests that begin alike compute it once, and say what they would have said alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tamis import LLM, SamplingParams
from tamis.engine.engine import Engine
from tamis.engine.outputs import RequestOutput
from tamis.model import Model
from tamis.plan import Plan

PAGE = 4
TEN = SamplingParams(max_tokens=10, ignore_eos=True)


def words(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(n)]


def make(model: Model, **settings: Any) -> LLM:
    defaults = {"kv_memory": "16MiB", "page_size": PAGE, "prefix_cache": True}
    return LLM(model, **(defaults | settings))


def empty(engine: Engine) -> bool:
    """Whether nothing but the tree holds pages, and it gives up all of them."""
    tree = engine.prefixes.tree
    assert tree.used_bytes == 0
    assert tree.idle_bytes == engine.cache.bytes_in_use
    tree.clear()
    return engine.cache.bytes_in_use == engine.cache.swap_bytes_in_use == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt-oss"])
def test_outputs_are_those_of_computing_everything(load: Any, name: str) -> None:
    model = load(name)
    cached, plain = make(model, max_batch_tokens=24), make(model, prefix_cache=False)
    shared = words(61)
    prompts = [shared + words(n, n) for n in (1, 3, 30)] + [shared[:40], shared, shared[:7]]
    [first, *others] = [cached.generate([prompt], TEN)[0] for prompt in prompts]
    assert first.metrics.cached_tokens == 0
    assert [o.metrics.cached_tokens for o in others] == [60, 60, 36, 60, 4]
    wanted = plain.generate(prompts, TEN)
    assert [o.token_ids for o in [first, *others]] == [o.token_ids for o in wanted]
    assert empty(cached.engine)


def test_a_conversation_goes_on_from_its_own_answer(llama: Model) -> None:
    llm, plain = make(llama), make(llama, prefix_cache=False)
    question = words(30)
    [first] = llm.generate([question], TEN)
    follow_up = question + first.token_ids + words(5, 1)
    [second] = llm.generate([follow_up], TEN)
    assert second.metrics.cached_tokens == 36  # of 39 tokens: the last one's KV was never needed
    assert second.token_ids == plain.generate([follow_up], TEN)[0].token_ids


def test_prompts_that_come_together_wait_for_what_they_share(llama: Model) -> None:
    llm, plain = make(llama, max_batch_tokens=32), make(llama, prefix_cache=False)
    shared = words(100)
    prompts = [shared + words(5, seed) for seed in range(6)] + [words(9, 7)]
    outputs = llm.generate(prompts, TEN)
    assert [o.metrics.cached_tokens for o in outputs] == [0, 100, 100, 100, 100, 100, 0]
    assert llm.engine.stats.prefill_tokens == 105 + 5 * 5 + 9
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain.generate(prompts, TEN)]


def test_a_request_that_shares_nothing_does_not_wait(llama: Model) -> None:
    engine = make(llama, max_batch_tokens=40).engine
    shared = words(60)
    for prompt in (shared, [*shared, 1], words(3, 1)):
        engine.add_request(prompt, TEN)
    engine.step()
    increments = engine.step()  # 20 tokens of the first, all of the third
    assert [i.request_id for i in increments] == ["0", "2"]


def test_a_prompt_of_which_everything_is_there_computes_its_last_token(llama: Model) -> None:
    llm = make(llama)
    prompt = words(16)
    outputs = [llm.generate([prompt], TEN)[0] for _ in range(2)]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[1].metrics.cached_tokens == 12


def test_counters_tell_hits_and_bytes(llama: Model) -> None:
    llm = make(llama)
    for _ in range(3):
        llm.generate([words(10)], SamplingParams(max_tokens=1))
    prefixes = llm.engine.prefixes
    assert (prefixes.lookups, prefixes.hits) == (3, 2)
    assert (prefixes.looked_up_tokens, prefixes.hit_tokens) == (30, 16)
    assert prefixes.tree.bytes == llm.engine.layout.bytes_for(8) == llm.engine.cache.bytes_in_use


def test_without_the_switch_nothing_is_kept(llama: Model) -> None:
    llm = make(llama, prefix_cache=False)
    for _ in range(2):
        [output] = llm.generate([words(10)], TEN)
        assert output.metrics.cached_tokens == 0
    assert llm.engine.cache.bytes_in_use == 0


def test_prompt_logprobs_compute_the_whole_prompt(llama: Model) -> None:
    llm = make(llama)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    first, second = (llm.generate([words(20)], params)[0] for _ in range(2))
    assert second.metrics.cached_tokens == 0
    assert first.prompt_logprobs == second.prompt_logprobs


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_keys_that_depend_on_the_length_are_not_reused(load: Any, name: str) -> None:
    model = load(name)
    llm, plain = make(model), make(model, prefix_cache=False)
    for n in (20, 60):  # below and beyond the length at which keys change
        [output] = llm.generate([words(n)], TEN)
        assert output.metrics.cached_tokens == 0
        assert output.token_ids == plain.generate([words(n)], TEN)[0].token_ids


# --- plans ----------------------------------------------------------------------------------------

READS_EXACT_PROMPTS = (
    "snapkv(budget=20, window=8)",
    "kivi(bits=4, group_size=4, residual=8)",
    "minicache()",
    "tokenselect(k=16, n_init=4, n_local=4)",
    "tokenrecycling()",
)
HAS_ITS_OWN = (
    "streamingllm(budget=20)",
    "h2o(budget=20)",
    "minference()",
    "gemfilter(layer=1, budget=16)",
    "headinfer()",
    "squeezeattention() + snapkv(budget=20, window=8)",
)


@pytest.mark.parametrize("plan", READS_EXACT_PROMPTS)
def test_plans_with_an_exact_prompt_share_it_with_exact_attention(llama: Model, plan: str) -> None:
    """Whoever comes first: their outputs are those that they have alone."""
    shared = words(61)
    prompts = [shared + words(n, n) for n in (12, 20)]
    alone = {
        one: [make(llama, prefix_cache=False, plan=one).generate([p], TEN)[0] for p in prompts]
        for one in (plan, "dense")
    }
    for plans in ((plan, "dense"), ("dense", plan)):
        llm = make(llama)
        outputs = [llm.generate([p], TEN, one)[0] for p, one in zip(prompts, plans, strict=True)]
        assert [o.metrics.cached_tokens for o in outputs] == [0, 60]
        wanted = [alone[one][i] for i, one in enumerate(plans)]
        assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
        assert [o.metrics.kv_bytes for o in outputs] == [o.metrics.kv_bytes for o in wanted]
        assert empty(llm.engine)


@pytest.mark.parametrize("plan", HAS_ITS_OWN)
def test_plans_that_change_or_watch_the_prompt_neither_take_nor_leave(
    llama: Model, plan: str
) -> None:
    llm, prompt = make(llama), words(61)
    for one in ("dense", plan, plan):
        [output] = llm.generate([prompt], TEN, one)
        assert output.metrics.cached_tokens == 0
    [again] = llm.generate([prompt], TEN, "dense")
    assert again.metrics.cached_tokens == 60
    assert empty(llm.engine)


def test_pages_with_summaries_are_shared_by_those_that_have_them(llama: Model) -> None:
    plan, prompt = "quest(pages=4)", words(61)
    llm, plain = make(llama), make(llama, prefix_cache=False)
    outputs = [llm.generate([prompt], TEN, one)[0] for one in ("dense", plan, plan, "dense")]
    assert [o.metrics.cached_tokens for o in outputs] == [0, 0, 60, 60]
    wanted = [plain.generate([prompt], TEN, one)[0] for one in ("dense", plan)]
    assert [o.token_ids for o in outputs[:2]] == [o.token_ids for o in wanted]
    assert outputs[2].token_ids == outputs[1].token_ids
    assert empty(llm.engine)


# --- memory ---------------------------------------------------------------------------------------


def test_what_is_kept_gives_way_to_requests(llama: Model) -> None:
    """Prompts that fill the memory one after another are refused nothing, and nobody preempted."""
    room = make(llama).engine.cache.required_bytes(120, chunk=32)
    llm = make(llama, kv_memory=room, max_batch_tokens=32)
    plain = make(llama, prefix_cache=False)
    for seed in range(5):
        prompts = [words(40, seed), words(45, -seed - 1)]
        outputs = llm.generate(prompts, TEN)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain.generate(prompts, TEN)]
        assert llm.engine.cache.bytes_in_use <= room
        assert all(o.metrics.preemptions == 0 for o in outputs)
    assert llm.engine.prefixes.tree.bytes > 0.7 * room
    assert empty(llm.engine)


def test_admission_counts_only_what_is_not_shared(llama: Model) -> None:
    """Memory for one long prompt and a half: requests that share it run together."""
    room = make(llama).engine.cache.required_bytes(150, chunk=32)
    engine = make(llama, kv_memory=room, max_batch_tokens=128).engine
    shared = words(100)
    for seed in range(4):
        engine.add_request(shared + words(4, seed), SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) == 4


def test_a_windowed_prompt_needs_no_more_room_than_without(load: Any) -> None:
    """Pages behind the windows are given up before a request is stuck for them."""
    model = load("gemma3")
    room = make(model).engine.cache.required_bytes(210, chunk=8)
    llm = make(model, kv_memory=room, max_batch_tokens=8)
    [output] = llm.generate([words(200)], TEN)
    assert output.finish_reason == "length"
    assert output.metrics.preemptions == 0
    assert empty(llm.engine)


def test_abort_keeps_what_was_computed_and_holds_nothing(llama: Model) -> None:
    llm = make(llama, max_batch_tokens=16)
    request_id = llm.engine.add_request(words(60), TEN)
    for _ in range(2):
        llm.engine.step()
    llm.engine.abort(request_id)
    assert llm.engine.prefixes.tree.used_bytes == 0
    [output] = llm.generate([words(60)], TEN)
    assert output.metrics.cached_tokens == 32
    assert empty(llm.engine)


def test_what_has_to_go_comes_back_from_host_memory(llama: Model) -> None:
    """Two documents in turn, in memory for one: the second time round nothing is computed."""
    room = make(llama).engine.cache.required_bytes(90, chunk=32)
    llm = make(llama, kv_memory=room, preemption="swap", swap_memory="1MiB", max_batch_tokens=32)
    plain = make(llama, prefix_cache=False)
    documents = [words(60, seed) for seed in range(2)]
    for turn in range(3):
        for document in documents:
            prompt = document + words(4, turn)
            [output] = llm.generate([prompt], TEN)
            assert output.metrics.cached_tokens == (60 if turn else 0)
            assert output.token_ids == plain.generate([prompt], TEN)[0].token_ids
            assert llm.engine.cache.bytes_in_use <= room
    assert llm.engine.prefixes.tree.host_bytes > 0
    assert empty(llm.engine)


def test_preempted_requests_take_host_memory_before_what_is_kept(llama: Model) -> None:
    room = make(llama).engine.cache.required_bytes(110, chunk=32)
    llm = make(llama, kv_memory=room, preemption="swap", swap_memory=room // 2, max_batch_tokens=32)
    for seed in range(3):
        llm.generate([words(90, seed)], TEN)
    assert llm.engine.prefixes.tree.host_bytes > room // 4
    engine = llm.engine
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for seed in range(3):
        engine.add_request(words(20, seed + 9), params)
    swapped = False
    while not engine.idle:
        engine.step()
        swapped |= bool(engine.scheduler.swapped)
        assert engine.cache.swap_bytes_in_use <= room // 2
    assert swapped
    assert empty(engine)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_traffic_with_shared_prefixes_changes_no_output(
    load: Callable[[str], Model], name: str, preemption: str, seed: int
) -> None:
    model, rng = load(name), random.Random(seed)
    free = make(model, prefix_cache=False)
    room = free.engine.cache.required_bytes(140, chunk=24)
    engine = make(
        model,
        kv_memory=room,
        max_batch_tokens=24,
        max_running=6,
        preemption=preemption,
        swap_memory=room // 3,
    ).engine
    stems = [words(n, n) for n in (9, 32, 50)]
    asked: dict[str, tuple[list[int], SamplingParams, str]] = {}
    outputs: dict[str, RequestOutput] = {}
    aborted: set[str] = set()
    for step in range(160):
        if step < 80 and rng.random() < 0.4:
            stem = rng.choice(stems)
            prompt = stem[: rng.choice([9, 20, 50])] + words(rng.choice([1, 6]), rng.randrange(4))
            params = SamplingParams(
                max_tokens=rng.choice([1, 7, 25]),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(1000),
                n=rng.choice([1, 1, 3]),
                ignore_eos=True,
            )
            plan = rng.choice(["dense", "dense", "snapkv(budget=12, window=4)"])
            asked[engine.add_request(prompt, params, Plan.parse(plan))] = (prompt, params, plan)
        if rng.random() < 0.03 and (running := sorted(asked.keys() - outputs.keys())):
            aborted.add(victim := rng.choice(running))
            outputs[victim] = engine.abort(victim)[-1].output  # type: ignore[assignment]
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
        assert engine.cache.bytes_in_use <= room
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}

    assert outputs.keys() == asked.keys()
    assert engine.stats.preemptions > 0
    assert engine.prefixes.hits > 5
    assert empty(engine)
    for request_id, (prompt, params, plan) in asked.items():
        [alone] = free.generate([prompt], params, plan)
        strict = request_id not in aborted
        for mine, reference in zip(
            outputs[request_id].completions, alone.completions, strict=strict
        ):
            assert mine.error is None
            n = None if strict else len(mine.token_ids)
            assert mine.token_ids == reference.token_ids[:n]
