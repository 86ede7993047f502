"""A context is computed once; what goes on from it is what a request of both would be."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tamis import LLM, SamplingParams
from tamis.errors import KVMemoryError, RequestError
from tamis.model import Model
from tamis.plan import Plan

PAGE = 4
TEN = SamplingParams(max_tokens=10, ignore_eos=True)

PLANS = (
    "dense",
    "kivi(bits=4, group_size=4, residual=8)",
    "minicache()",
    "streamingllm(budget=20, sinks=2)",
    "streamingllm(budget=20, sinks=2, in_cache=False)",
    "lagkv(budget=20, sinks=2, lag=8)",
    "headinfer(resident=0.5)",
    "quest(pages=4)",
    "tokenrecycling()",
)


def words(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(n)]


def make(model: Model, **settings: Any) -> LLM:
    return LLM(model, **({"kv_memory": "16MiB", "page_size": PAGE} | settings))


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_exact_attention_says_what_it_says_of_both_together(
    load: Any, name: str, prefix_cache: bool
) -> None:
    llm = make(load(name), prefix_cache=prefix_cache, max_batch_tokens=24)
    plain = make(load(name))
    document, questions = words(62), [words(9, 1), words(1, 2), words(30, 3)]
    context = llm.add_context(document)
    outputs = llm.generate(questions, TEN, context=context)
    wanted = plain.generate([document + question for question in questions], TEN)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
    assert [o.metrics.cached_tokens for o in outputs] == [62] * 3
    assert outputs[0].prompt_token_ids == document + questions[0]


@pytest.mark.parametrize("plan", PLANS)
def test_a_question_after_a_context_is_answered_the_same_every_time(
    llama: Model, plan: str
) -> None:
    """From one snapshot, alone and among others, and as from a snapshot of its own."""
    document, questions = words(61), [words(9, 1), words(5, 2)]
    llm = make(llama)
    context = llm.add_context(document, plan)
    together = llm.generate(questions, TEN, context=context)
    again = [llm.generate([question], TEN, context=context)[0] for question in questions]
    fresh = []
    for question in questions:
        other = make(llama)
        [output] = other.generate([question], TEN, context=other.add_context(document, plan))
        fresh.append(output)
    for outputs in (again, fresh):
        assert [o.token_ids for o in outputs] == [o.token_ids for o in together]
    assert [o.metrics.cached_tokens for o in together] == [61, 61]
    assert llm.engine.cache.bytes_in_use == llm.engine.context_bytes
    llm.delete_context(context)
    assert llm.engine.cache.bytes_in_use == llm.engine.cache.host_bytes_in_use == 0


@pytest.mark.parametrize("plan", ["streamingllm(budget=20, sinks=2)", "kivi(group_size=4)"])
def test_a_plan_that_keeps_everything_answers_as_exact_attention(llama: Model, plan: str) -> None:
    document, question = words(61), words(9, 1)
    wide = plan.replace("budget=20", "budget=500").replace("=4)", "=4, residual=500)")
    llm = make(llama)
    [output] = llm.generate([question], TEN, context=llm.add_context(document, wide))
    [wanted] = make(llama).generate([document + question], TEN)
    assert output.token_ids == wanted.token_ids


def test_a_question_runs_at_once_where_nothing_is_evicted_between_its_tokens(llama: Model) -> None:
    steps = {}
    for plan in ("kivi(group_size=4, residual=8)", "streamingllm(budget=20)"):
        llm = make(llama)
        context = llm.add_context(words(40), plan)
        before = llm.engine.stats.steps
        llm.generate([words(12)], SamplingParams(max_tokens=1), context=context)
        steps[plan[:4]] = llm.engine.stats.steps - before
    assert steps == {"kivi": 1, "stre": 12}


def test_branches_and_preemption_go_on_from_the_context(llama: Model) -> None:
    """Requests that do not fit together take turns, each from the context again."""
    document = words(50)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=2, ignore_eos=True)
    questions = [words(6, seed) for seed in range(3)]
    for plan in ("dense", "minicache()"):
        wide = make(llama)
        context = wide.add_context(document, plan)
        wanted = [wide.generate([q], params, context=context)[0] for q in questions]
        room = make(llama).engine.cache.required_bytes(50 + 5 * 36, chunk=16)
        llm = make(llama, kv_memory=room, max_batch_tokens=16)
        context = llm.add_context(document, plan)
        outputs = llm.generate(questions, params, context=context)
        assert sum(o.metrics.preemptions for o in outputs) > 0
        for output, reference in zip(outputs, wanted, strict=True):
            assert [c.token_ids for c in output.completions] == [
                c.token_ids for c in reference.completions
            ]
        llm.delete_context(context)
        assert llm.engine.cache.bytes_in_use == 0


def test_a_deleted_context_is_kept_for_those_that_go_on_from_it(llama: Model) -> None:
    llm = make(llama)
    context = llm.add_context(words(40))
    [wanted] = llm.generate([words(5)], TEN, context=context)
    llm.engine.add_request(words(5), TEN, request_id="late", context=context)
    llm.delete_context(context)
    assert llm.engine.context_bytes > 0
    with pytest.raises(RequestError, match="no context"):
        llm.engine.add_request(words(5), TEN, context=context)
    outputs = [i.output for i in _run(llm) if i.output]
    assert outputs[0].token_ids == wanted.token_ids
    assert llm.engine.cache.bytes_in_use == llm.engine.context_bytes == 0
    with pytest.raises(RequestError, match="no context"):
        llm.delete_context(context)


def test_contexts_outlive_everything_and_give_way_to_nothing(llama: Model) -> None:
    room = make(llama).engine.cache.required_bytes(120, chunk=16)
    llm = make(llama, kv_memory=room, max_batch_tokens=16, prefix_cache=True)
    context = llm.add_context(words(40))
    [wanted] = llm.generate([words(5)], TEN, context=context)
    for seed in range(4):
        llm.generate([words(50, seed)], TEN)
    [again] = llm.generate([words(5)], TEN, context=context)
    assert again.token_ids == wanted.token_ids
    with pytest.raises(KVMemoryError, match="delete one"):
        llm.generate([words(100)], TEN)
    llm.delete_context(context)
    assert llm.generate([words(100)], TEN)[0].error is None


@pytest.mark.parametrize(
    "plan", ["snapkv(budget=20, window=8)", "h2o(budget=20)", "gemfilter(layer=1, budget=16)"]
)
def test_what_a_question_chose_is_refused_as_a_context(llama: Model, plan: str) -> None:
    llm = make(llama)
    with pytest.raises(RequestError, match="depends on the question"):
        llm.add_context(words(40), plan)
    assert llm.engine.idle


def test_wrong_requests_after_a_context_are_refused(llama: Model) -> None:
    llm = make(llama)
    context = llm.add_context(words(40), "kivi(group_size=4, residual=8)")
    with pytest.raises(RequestError, match="leave their plan out"):
        llm.generate([words(5)], TEN, "dense", context=context)
    with pytest.raises(RequestError, match="prompt_logprobs"):
        llm.generate([words(5)], SamplingParams(prompt_logprobs=1), context=context)
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[]], TEN, context=context)
    with pytest.raises(RequestError, match="already"):
        llm.engine.add_request(words(5), TEN, request_id=context)
    assert llm.engine.idle
    llm.delete_context(context)
    assert llm.engine.cache.bytes_in_use == 0


def test_the_increment_that_ends_a_context_says_so(llama: Model) -> None:
    engine = make(llama, max_batch_tokens=16).engine
    assert engine.add_context(words(40), Plan.parse("dense"), "book") == "book"
    engine.step()
    with pytest.raises(RequestError, match="not computed yet"):
        engine.add_request(words(5), TEN, context="book")
    increments = [increment for _ in range(2) for increment in engine.step()]
    [last] = increments
    assert (last.request_id, last.finish_reason, last.token_ids) == ("book", "stop", ())
    assert last.output is not None
    assert last.output.metrics.kv_bytes == engine.context_bytes > 0
    assert engine.idle


def test_a_context_that_is_aborted_leaves_nothing(llama: Model) -> None:
    engine = make(llama, max_batch_tokens=16).engine
    engine.add_context(words(40), None, "book")
    engine.step()
    [last] = engine.abort("book")
    assert last.finish_reason == "abort"
    assert engine.cache.bytes_in_use == 0
    assert "book" not in engine.contexts


def test_text_after_a_context_begins_no_new_sequence(llama: Model) -> None:
    llm = make(llama)
    context = llm.add_context("A book.")
    [output] = llm.generate(["Who?"], TEN, context=context)
    assert output.prompt_token_ids == llm.encode("A book.Who?")


def _run(llm: LLM) -> list[Any]:
    increments = []
    while not llm.engine.idle:
        increments += llm.engine.step()
    return increments


def test_several_contexts_are_refused_by_a_plan_that_does_not_join_them(llama: Model) -> None:
    llm = make(llama)
    contexts = [llm.add_context(words(20, seed)) for seed in range(2)]
    with pytest.raises(RequestError, match="names 2 contexts, and the plan dense goes on from one"):
        llm.generate([words(5)], TEN, context=contexts)
    [one] = llm.generate([words(5)], TEN, context=contexts[:1])
    [same] = llm.generate([words(5)], TEN, context=contexts[0])
    streamed = list(llm.stream(words(5), TEN, context=contexts[0]))[-1].output
    assert streamed is not None
    assert one.token_ids == same.token_ids == streamed.token_ids
