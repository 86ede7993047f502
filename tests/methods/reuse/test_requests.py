"""Requests over joined contexts: exact where they should be, in any batch, within their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tamis import LLM, SamplingParams
from tamis.cache import SequenceCache
from tamis.engine import blend
from tamis.errors import KVMemoryError, PlanError, RequestError
from tamis.model import Model
from tamis.plan import Plan
from tests.methods.reuse.conftest import DOCUMENTS, PAGE, QUESTION, TEN, add, logprobs, make, words

WHOLE = [token for document in DOCUMENTS for token in document]
PLANS = ("promptcache()", "cacheblend(recompute=0.3)")
TOGETHER = (
    "kivi(bits=4, group_size=4, residual=8)",
    "snapkv(budget=0.3, window=16)",
    "snapkv(budget=0.3, window=4) + headadaptive()",
    "minicache()",
    "quest(pages=6)",
    "tokenselect(k=32, n_init=4, n_local=8)",
    "tokenrecycling()",
)


def run(llm: LLM) -> dict[str, Any]:
    """Run all requests to their ends: their outputs."""
    outputs = {}
    while not llm.engine.idle:
        for increment in llm.engine.step():
            if increment.output is not None:
                outputs[increment.request_id] = increment.output
    return outputs


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen3", "phi3", "gpt-neox", "cohere"])
@pytest.mark.parametrize("chunk", [2048, 24])
def test_computing_everything_again_is_exact_attention(
    load: Callable[..., Model], name: str, chunk: int
) -> None:
    llm = make(load(name), max_batch_tokens=chunk)
    contexts = add(llm)
    [wanted] = llm.generate([WHOLE + QUESTION], TEN, "dense")
    [output] = llm.generate([QUESTION], TEN, "cacheblend(recompute=1.0)", context=contexts)
    assert output.token_ids == wanted.token_ids
    assert output.prompt_token_ids == wanted.prompt_token_ids
    assert logprobs(output) == pytest.approx(logprobs(wanted), abs=1e-3)
    assert output.metrics.cached_tokens == len(WHOLE)


def test_computing_nothing_again_is_promptcache(llama: Model) -> None:
    llm = make(llama)
    contexts = add(llm)
    [wanted] = llm.generate([QUESTION], TEN, "promptcache()", context=contexts)
    [output] = llm.generate([QUESTION], TEN, "cacheblend(recompute=0.0)", context=contexts)
    assert output.token_ids == wanted.token_ids
    assert logprobs(output) == logprobs(wanted)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("n", [4, 3, 1])
def test_one_context_is_an_exact_prefix(llama: Model, plan: str, n: int) -> None:
    """Whether it ends with a page or within one."""
    llm = make(llama)
    document = words(8 * PAGE + n)
    context = llm.add_context(document)
    [wanted] = llm.generate([document + QUESTION], TEN)
    for names in (context, [context]):
        [output] = llm.generate([QUESTION], TEN, plan, context=names)
        assert output.token_ids == wanted.token_ids
        assert logprobs(output) == pytest.approx(logprobs(wanted), abs=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt-oss"])
def test_contexts_are_joined_under_windows_as_what_windows_have_left_of_them(
    load: Callable[..., Model], name: str
) -> None:
    """What is said does not depend on whether windows have let go of pages already: of a prompt
    that the window spans, nothing has been."""
    model = load(name)
    llm, coarse = make(model), make(model, page_size=64)
    [output] = llm.generate([QUESTION], TEN, "promptcache()", context=add(llm))
    [wanted] = coarse.generate([QUESTION], TEN, "promptcache()", context=add(coarse))
    assert output.token_ids == wanted.token_ids
    assert logprobs(output) == pytest.approx(logprobs(wanted), abs=1e-3)
    with pytest.raises(PlanError, match="sliding window"):
        llm.generate([QUESTION], TEN, "cacheblend()", context=[*llm.engine.contexts._named])


@pytest.mark.parametrize("chunk", [2048, 24])
def test_requests_say_the_same_alone_and_among_others(llama: Model, chunk: int) -> None:
    plans = [*PLANS, "dense", "cacheblend(recompute=0.6) + snapkv(budget=0.5, window=8)", *PLANS]
    llm = make(llama, max_batch_tokens=chunk)
    contexts = add(llm)
    names = [contexts, contexts[::-1], None, contexts, contexts[:2], [contexts[1]] * 3]
    questions = [words(5 + 7 * seed, seed) for seed in range(len(plans))]
    requests = list(zip(questions, plans, names, strict=True))
    alone = [llm.generate([q], TEN, plan, context=c)[0].token_ids for q, plan, c in requests]
    ids = [llm.engine.add_request(q, TEN, Plan.parse(plan), context=c) for q, plan, c in requests]
    outputs = run(llm)
    assert [outputs[one].token_ids for one in ids] == alone
    assert llm.engine.cache.bytes_in_use == llm.engine.context_bytes


@pytest.mark.parametrize("other", TOGETHER)
@pytest.mark.parametrize("reuse", PLANS)
def test_other_stages_act_on_the_joined_prompt(
    load: Callable[..., Model], reuse: str, other: str
) -> None:
    """In fp32 and bf16, in one chunk and in several; with all tokens kept, as without them."""
    for dtype in ("float32", "bfloat16"):
        said = []
        for chunk in (2048, 24):
            llm = make(load("llama", dtype), max_batch_tokens=chunk)
            [output] = llm.generate([QUESTION], TEN, f"{reuse} + {other}", context=add(llm))
            assert output.error is None
            assert len(output.token_ids) == 10
            assert llm.engine.cache.bytes_in_use == llm.engine.context_bytes
            said.append(output.token_ids)
        if dtype == "float32":
            assert said[0] == said[1]


@pytest.mark.parametrize(
    "other",
    [
        "snapkv(budget=4096, window=16)",
        "kivi(group_size=4, residual=4096)",
        "quest(pages=1.0, skip_layers=0)",
        "tokenrecycling()",
    ],
)
def test_other_stages_that_change_nothing_change_nothing_here(llama: Model, other: str) -> None:
    llm = make(llama)
    contexts = add(llm)
    for reuse in (*PLANS, "cacheblend(recompute=1.0)"):
        [wanted] = llm.generate([QUESTION], TEN, reuse, context=contexts)
        [output] = llm.generate([QUESTION], TEN, f"{reuse} + {other}", context=contexts)
        assert output.token_ids == wanted.token_ids


@pytest.mark.parametrize("chunk", [2048, 7])
def test_queries_that_are_computed_again_are_nobodys_question(llama: Model, chunk: int) -> None:
    """Methods that look at the last queries see the question's, in every layer the same ones."""
    llm = make(llama, max_batch_tokens=chunk)
    plan = Plan.parse("cacheblend(recompute=0.3) + snapkv(budget=4096, window=16)")
    llm.engine.add_request(QUESTION, TEN, plan, context=add(llm))
    while llm.engine.scheduler.waiting or llm.engine.scheduler.running[0].in_prompt:
        llm.engine.step()
    life = llm.engine.scheduler.running[0].life
    assert life is not None
    n = len(WHOLE) + len(QUESTION)
    assert life.query_positions == list(range(len(WHOLE), n))
    assert {len(layer.queries) for layer in life.layers if layer.queries is not None} == {9}


def test_streams_join_contexts_too(llama: Model) -> None:
    llm = make(llama)
    contexts = add(llm)
    [wanted] = llm.generate([QUESTION], TEN, "cacheblend()", context=contexts)
    *_, last = llm.stream(QUESTION, TEN, "cacheblend()", context=contexts)
    assert last.output is not None
    assert last.output.token_ids == wanted.token_ids


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("plan", PLANS)
def test_branches_and_preempted_requests_go_on_where_they_were(
    llama: Model, plan: str, preemption: Any
) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=2, ignore_eos=True)
    questions = [words(6, seed) for seed in range(3)]
    wide = make(llama)
    contexts = add(wide)
    wanted = [wide.generate([q], params, plan, context=contexts)[0] for q in questions]
    room = wide.engine.cache.required_bytes(3 * len(WHOLE) + 130, chunk=16)
    llm = make(llama, kv_memory=room, max_batch_tokens=16, preemption=preemption)
    contexts = add(llm)
    outputs = llm.generate(questions, params, plan, context=contexts)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    for output, reference in zip(outputs, wanted, strict=True):
        said = [completion.token_ids for completion in output.completions]
        assert said == [completion.token_ids for completion in reference.completions]
    for context in contexts:
        llm.delete_context(context)
    assert llm.engine.cache.bytes_in_use == 0


@pytest.mark.parametrize("plan", PLANS)
def test_a_request_can_be_ended_at_any_step(llama: Model, plan: str) -> None:
    llm = make(llama, max_batch_tokens=16)
    contexts = add(llm)
    for steps in range(12):
        llm.engine.add_request(QUESTION, TEN, Plan.parse(plan), "one", context=contexts)
        for _ in range(steps):
            llm.engine.step()
        llm.engine.abort("one")
        assert llm.engine.idle
        assert llm.engine.cache.bytes_in_use == llm.engine.context_bytes


@pytest.mark.parametrize("plan", PLANS)
def test_deleted_contexts_stay_for_those_who_joined_them(llama: Model, plan: str) -> None:
    llm = make(llama)
    contexts = add(llm)
    [wanted] = llm.generate([QUESTION], TEN, plan, context=contexts)
    late = llm.engine.add_request(QUESTION, TEN, Plan.parse(plan), context=contexts)
    for context in contexts:
        llm.delete_context(context)
    assert llm.engine.context_bytes > 0
    assert run(llm)[late].token_ids == wanted.token_ids
    assert llm.engine.cache.bytes_in_use == 0


@pytest.mark.parametrize("plan", PLANS)
def test_full_pages_of_the_first_context_are_shared_and_all_others_copied(
    llama: Model, plan: str
) -> None:
    llm = make(llama)
    contexts = add(llm)
    before = llm.engine.cache.bytes_in_use
    llm.engine.add_request(QUESTION, TEN, Plan.parse(plan), "one", context=contexts)
    peak = before
    for _ in range(20):
        llm.engine.step()
        peak = max(peak, llm.engine.cache.bytes_in_use)
    layout = llm.engine.layout
    n = len(WHOLE) + len(QUESTION) + TEN.max_tokens - 1
    shared = len(DOCUMENTS[0]) // PAGE * PAGE
    assert peak - before == layout.bytes_for(n) - layout.bytes_for(shared)
    assert llm.engine.cache.bytes_in_use == before


def test_no_more_requests_start_than_there_is_memory_for(llama: Model) -> None:
    """None is preempted for want of pages that could have been foreseen."""
    wide = make(llama)
    room = wide.engine.cache.required_bytes(4 * len(WHOLE), chunk=64)
    llm = make(llama, kv_memory=room, max_batch_tokens=64)
    contexts = add(llm)
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    outputs = llm.generate([QUESTION] * 6, short, "promptcache()", context=contexts)
    assert [output.error for output in outputs] == [None] * 6
    assert sum(output.metrics.preemptions for output in outputs) == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("begun", [True, False])
def test_joining_contexts_takes_no_page_that_was_not_reserved(
    load: Callable[..., Model], name: str, begun: bool
) -> None:
    """Whether it begins with the first one's pages or with nothing, under windows too."""
    llm = make(load(name))
    contexts = [llm.engine.contexts.find(context) for context in add(llm)]
    pages, first = llm.engine.cache, contexts[0].cache
    assert first is not None
    cache = first.fork() if begun else pages.new_sequence()
    blend.reserve(cache, contexts, 7)
    reserved = pages.bytes_in_use
    assert reserved > llm.engine.context_bytes
    blend.assemble(cache, contexts, llm.model.shift_keys, 7)
    assert pages.bytes_peak == reserved
    assert cache.next_position == len(WHOLE) + 7


@pytest.mark.parametrize(("name", "room"), [("mistral", "88KiB"), ("gemma3", "120KiB")])
def test_contexts_are_copied_once_there_is_room_and_not_before(
    load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, name: str, room: str
) -> None:
    """While a window slides over them, they take more pages than they do in the end."""
    llm = make(load(name), kv_memory=room, max_batch_tokens=64)
    contexts = add(llm)
    other = llm.engine.add_request(words(30), SamplingParams(max_tokens=60, ignore_eos=True))
    llm.engine.step()
    copies, append = [], SequenceCache.append_from
    monkeypatch.setattr(
        SequenceCache, "append_from", lambda *given: (copies.append(given), append(*given))
    )
    plan = Plan.parse("promptcache()")
    joined = llm.engine.add_request(QUESTION, TEN, plan, context=contexts)
    for _ in range(10):
        llm.engine.step()
    assert copies == []
    outputs = run(llm)
    assert [outputs[one].error for one in (other, joined)] == [None, None]
    assert len(copies) == len(contexts) - 1  # the first is shared


def test_what_would_not_fit_beside_its_contexts_is_refused(llama: Model) -> None:
    """All but the first are copied, so that a prompt takes its room a second time."""
    wide = make(llama)
    room = wide.engine.cache.required_bytes(len(WHOLE) + len(DOCUMENTS[0]) + 40, chunk=64)
    llm = make(llama, kv_memory=room, max_batch_tokens=64)
    contexts = add(llm)
    with pytest.raises(KVMemoryError, match="delete one"):
        llm.generate([QUESTION], TEN, "promptcache()", context=contexts)
    [output] = llm.generate([QUESTION], TEN, "promptcache()", context=contexts[:2])
    assert output.error is None
    assert llm.engine.cache.bytes_in_use == llm.engine.context_bytes


def test_plans_that_need_contexts_are_exact_attention_without(llama: Model) -> None:
    llm = make(llama, plan="promptcache()")
    [wanted] = make(llama).generate([QUESTION], TEN)
    [output] = llm.generate([QUESTION], TEN)
    assert output.token_ids == wanted.token_ids
    contexts = add(llm)  # computed exactly too
    [joined] = llm.generate([QUESTION], TEN, context=contexts)
    assert joined.error is None


def test_what_cannot_be_joined_is_refused(load: Callable[..., Model], llama: Model) -> None:
    llm = make(llama)
    one = llm.add_context(DOCUMENTS[0])
    other = llm.add_context(DOCUMENTS[1], "kivi(group_size=4)")
    with pytest.raises(RequestError, match=r"'promptcache\(\)' or 'cacheblend\(\)' would join"):
        llm.generate([QUESTION], TEN, "dense", context=[one, one])
    with pytest.raises(RequestError, match=r"computed exactly, and .* lives by the plan kivi"):
        llm.generate([QUESTION], TEN, "promptcache()", context=[one, other])
    with pytest.raises(RequestError, match="no context"):
        llm.generate([QUESTION], TEN, "promptcache()", context=[one, "nobody"])
    params = SamplingParams(prompt_logprobs=0)
    with pytest.raises(RequestError, match="prompt_logprobs"):
        llm.generate([QUESTION], params, "promptcache()", context=[one, one])
    dynamic = make(load("llama-dynamic"))
    contexts = add(dynamic)
    with pytest.raises(PlanError, match="position embeddings do not allow"):
        dynamic.generate([QUESTION], TEN, "promptcache()", context=contexts)


@pytest.mark.parametrize(
    "other",
    ["gemfilter()", "headinfer()", "h2o()", "d2o()", "lagkv()", "duoattention()", "sparq()"],
)
def test_methods_that_need_the_prompt_to_run_are_refused(other: str) -> None:
    for reuse in PLANS:
        with pytest.raises(PlanError, match=other.split("(")[0]):
            Plan.parse(f"{reuse} + {other}")
    with pytest.raises(PlanError, match="minference"):
        Plan.parse("cacheblend() + minference()")
    assert Plan.parse("promptcache() + minference()")
