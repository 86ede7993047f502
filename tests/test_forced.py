"""A forced output is scored as the plan's own generation would have scored it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tamis import LLM, SamplingParams
from tamis.engine.outputs import TokenLogprob
from tamis.errors import RequestError

GENERATOR = torch.Generator().manual_seed(11)
PROMPT, FORCED = (torch.randint(0, 256, (n,), generator=GENERATOR).tolist() for n in (120, 40))
PARAMS = SamplingParams(forced=FORCED, logprobs=2)
SAME = 2e-4
"""How far log-probabilities are apart that chunks and single tokens compute."""


@pytest.fixture(scope="module")
def open_llm(tiny_dir: Callable[[str], Path]) -> Callable[..., LLM]:
    def made(name: str = "llama", **changes: object) -> LLM:
        settings = {"dtype": "float32", "kv_memory": "8MiB", "page_size": 16}
        return LLM(tiny_dir(name), **settings | changes)  # type: ignore[arg-type]

    return made


@pytest.fixture(scope="module")
def llm(open_llm: Callable[..., LLM]) -> LLM:
    return open_llm()


def numbers(scored: list[TokenLogprob] | None) -> list[float]:
    assert scored is not None
    return [one.logprob for one in scored]


def forced(llm: LLM, plan: str = "dense", ids: list[int] = FORCED) -> list[float]:
    params = SamplingParams(forced=ids, logprobs=0)
    return numbers(llm.generate(PROMPT, params, plan)[0].logprobs)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_dense_scores_it_as_if_it_were_a_part_of_the_prompt(
    name: str, open_llm: Callable[..., LLM]
) -> None:
    llm = open_llm(name)
    whole = SamplingParams(max_tokens=1, prompt_logprobs=2)
    [read] = llm.generate(PROMPT + FORCED, whole)
    [output] = llm.generate(PROMPT, PARAMS)

    assert output.token_ids == FORCED
    assert output.logprobs is not None
    assert read.prompt_logprobs is not None
    for mine, its in zip(output.logprobs, read.prompt_logprobs[-len(FORCED) :], strict=True):
        assert its is not None
        assert mine.token_id == its.token_id
        assert mine.logprob == pytest.approx(its.logprob, abs=SAME)
        assert [one for one, _ in mine.top] == [one for one, _ in its.top]


@pytest.mark.parametrize(
    "plan", ["snapkv(budget=1.0)", "lazyllm(keep=1.0)", "quest(pages=1.0)", "headinfer()"]
)
def test_a_plan_that_keeps_everything_scores_it_as_dense_does(plan: str, llm: LLM) -> None:
    assert forced(llm, plan) == pytest.approx(forced(llm), abs=SAME)


@pytest.mark.parametrize("plan", ["snapkv(budget=48)", "h2o(budget=0.3)", "quest(pages=2)"])
def test_a_plan_that_acts_after_the_prompt_shows(plan: str, llm: LLM) -> None:
    mine, dense = forced(llm, plan), forced(llm)
    assert max(abs(a - b) for a, b in zip(mine, dense, strict=True)) > 10 * SAME


@pytest.mark.parametrize(
    "plan",
    [
        "dense",
        "snapkv(budget=48) + kivi(group_size=16, residual=16) + quest(pages=3)",
        "streamingllm(budget=32)",
        "lazyllm(keep=0.5)",
        "gemfilter(layer=1, budget=0.4)",
    ],
)
def test_what_a_plan_generates_scores_the_same_when_it_is_forced(plan: str, llm: LLM) -> None:
    free = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=3, logprobs=0)
    [generated] = llm.generate(PROMPT, free, plan)
    assert forced(llm, plan, generated.token_ids) == numbers(generated.logprobs)


def test_drafts_go_as_far_as_they_are_what_is_forced(llm: LLM) -> None:
    greedy = llm.generate(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True))[0].token_ids
    stats, accepted = llm.engine.stats, {}
    for name, ids in {"greedy": greedy, "other": FORCED}.items():
        before = stats.accepted
        scores = forced(llm, "tokenrecycling()", ids)
        accepted[name] = stats.accepted - before
        assert scores == pytest.approx(forced(llm, ids=ids), abs=SAME)
    assert accepted["greedy"] > accepted["other"]


def test_preemption_and_the_batch_change_nothing(open_llm: Callable[..., LLM], llm: LLM) -> None:
    """The last of four requests that outgrow their memory gives way and is computed again."""
    tight, prompt = open_llm(kv_memory=llm.engine.cache.required_bytes(150)), PROMPT[:12]
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    first, second, third, last = tight.generate([prompt] * 4, [free, PARAMS, free, PARAMS])
    assert tight.engine.stats.preemptions > 0
    [alone] = llm.generate(prompt, PARAMS)
    for output in (second, last):
        assert numbers(output.logprobs) == pytest.approx(numbers(alone.logprobs), abs=SAME)
    assert first.token_ids == third.token_ids == llm.generate(prompt, free)[0].token_ids


def test_ends_of_sequences_in_it_end_nothing(llm: LLM) -> None:
    eos = min(llm.model.eos_token_ids)
    [output] = llm.generate(PROMPT, SamplingParams(forced=[7, eos, 8], logprobs=0))
    assert output.token_ids == [7, eos, 8]
    assert output.finish_reason == "length"
    assert all(math.isfinite(one) and one < 0 for one in numbers(output.logprobs))


def test_what_cannot_be_forced_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="forced names token 9999"):
        llm.generate(PROMPT, SamplingParams(forced=[9999]))
    with pytest.raises(RequestError, match="leaves of the model's context, is 392 tokens"):
        llm.generate(PROMPT, SamplingParams(forced=[1] * 393))
    with pytest.raises(RequestError, match="stop and forced both say"):
        SamplingParams(forced=[1], stop="x")
    with pytest.raises(RequestError, match="forced is '1'; it must be a sequence"):
        SamplingParams(forced="1")  # type: ignore[arg-type]
    assert SamplingParams(forced=[1, 2], max_tokens=1).max_tokens == 2
