"""All pairs of methods of different stages run, or are refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tamis import LLM, SamplingParams
from tamis.engine.outputs import RequestOutput
from tamis.errors import PlanError
from tamis.methods.registry import methods
from tamis.plan import Plan
from tests.methods.engine.plans import CASES, LONG, pair, pairs

NEW_TOKENS = 20
PARAMS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
COMPOSED, REFUSED = pairs()
SAMPLE = 8
"""Every so many pairs one runs in the fast tests too."""


def assert_runs(llm: LLM, plan: str, prompts: list[list[int]]) -> None:
    """Two prompts at once come to their ends, and leave nothing behind."""
    outputs = llm.generate(prompts[1:3], PARAMS, plan)
    for output in outputs:
        assert_finished(output)
    cache = llm.engine.cache
    assert cache.bytes_in_use == cache.host_bytes_in_use == 0


def assert_finished(output: RequestOutput) -> None:
    """All its tokens were generated, each with a log-probability."""
    assert (output.finish_reason, output.error) == ("length", None)
    assert len(output.token_ids) == NEW_TOKENS
    assert output.logprobs is not None
    assert all(math.isfinite(entry.logprob) for entry in output.logprobs)


def composed() -> list[object]:
    """The pairs that compose, all but a sample of them slow."""
    return [
        pytest.param(*names, id="-".join(names), marks=[] if i % SAMPLE == 0 else pytest.mark.slow)
        for i, names in enumerate(COMPOSED)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [2048, 40], ids=["whole", "chunked"])
@pytest.mark.parametrize(("first", "second"), composed())
def test_pairs_run(
    first: str,
    second: str,
    chunk: int,
    dtype: str,
    llms: Callable[..., LLM],
    prompts: list[list[int]],
) -> None:
    llm = llms("llama", dtype, max_batch_tokens=chunk)
    assert_runs(llm, pair(first, second), prompts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [2048, 40], ids=["whole", "chunked"])
@pytest.mark.parametrize("model", ["llama", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("plan", LONG, ids=["prefill-to-select", "heads-to-codec", "budget-merge"])
def test_long_plans_run(
    plan: str,
    model: str,
    chunk: int,
    dtype: str,
    llms: Callable[..., LLM],
    prompts: list[list[int]],
) -> None:
    assert_runs(llms(model, dtype, max_batch_tokens=chunk), plan, prompts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [2048, 40], ids=["whole", "chunked"])
@pytest.mark.parametrize("model", ["gemma3", pytest.param("gpt-oss", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_methods_run_beside_sliding_windows(
    name: str,
    model: str,
    chunk: int,
    dtype: str,
    llms: Callable[..., LLM],
    prompts: list[list[int]],
) -> None:
    assert_runs(llms(model, dtype, max_batch_tokens=chunk), CASES[name].plan, prompts)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", CASES)
def test_prompts_shorter_than_a_page_run(
    name: str, page_size: int, llms: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    """Down to one token: shorter than windows, sinks, residuals and budgets."""
    llm = llms("llama", page_size=page_size)
    short = [prompts[0][:n] for n in (1, 2, 9, 16, 17, 33)]
    for output in llm.generate(short, PARAMS, CASES[name].plan):
        assert_finished(output)
    assert llm.engine.cache.bytes_in_use == llm.engine.cache.host_bytes_in_use == 0


@pytest.mark.parametrize(("first", "second"), REFUSED)
def test_refused_pairs_are_named_with_the_reason(first: str, second: str) -> None:
    with pytest.raises(PlanError, match=r"cannot be composed: .{20}") as refusal:
        Plan.parse(pair(first, second))
    for name in (first, second):
        base = Plan.parse(CASES[name].base or None).methods
        mine = [name, *(method.method_name() for method in base)]
        assert any(one in str(refusal.value) for one in mine)


def test_most_pairs_of_stages_compose() -> None:
    """So that a rule that refuses too much is noticed."""
    stages = {tuple(methods()[name].stage for name in names) for names in COMPOSED}
    for wanted in (
        ("prefill", "evict"),
        ("prefill", "codec"),
        ("prefill", "select"),
        ("prefill", "place"),
        ("prefill", "draft"),
        ("budget", "evict"),
        ("budget", "merge"),
        ("evict", "merge"),
        ("evict", "heads"),
        ("evict", "codec"),
        ("evict", "select"),
        ("heads", "codec"),
        ("heads", "select"),
        ("codec", "select"),
        ("codec", "draft"),
        ("share", "draft"),
    ):
        assert wanted in stages


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.base])
def test_two_methods_of_one_stage_are_refused(name: str) -> None:
    stage = methods()[name].stage
    for other in CASES:
        if other != name and methods()[other].stage == stage:
            with pytest.raises(PlanError, match=f"both decide the stage '{stage}'"):
                Plan.parse(f"{CASES[name].term} + {CASES[other].term}")
