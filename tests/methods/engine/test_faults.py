"""What goes wrong is said where the user can act, ends what it concerns and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tamis import LLM, SamplingParams
from tamis.errors import PlanError, RequestError
from tamis.methods.base import Evict, Prefill, Select
from tamis.methods.views import ChunkView, DecodeView, LayerView
from tamis.model import load_model
from tamis.plan import Plan

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class FailingEvict(Evict):
    """Fails when the prompt is computed."""

    paper: ClassVar[str] = "none"
    budget: int = 8

    def scores(self, view: LayerView) -> Tensor:
        raise ValueError("no scores today")


@dataclass(frozen=True)
class FailingSelect(Select):
    """Fails at every generated token."""

    paper: ClassVar[str] = "none"

    def select(self, view: DecodeView) -> None:
        raise ValueError("no selection today")


@dataclass(frozen=True)
class FailingPrefill(Prefill):
    """Fails in the middle of the model's forward."""

    paper: ClassVar[str] = "none"

    def pattern(self, view: ChunkView) -> None:
        if view.layer == 1:
            raise ValueError("no pattern today")


@dataclass(frozen=True)
class WrongShape(Evict):
    """Keeps tokens of heads that there are not."""

    paper: ClassVar[str] = "none"
    budget: int = 8

    def scores(self, view: LayerView) -> Tensor:
        return torch.zeros(7, view.cached.shape[1])


def assert_empty(llm: LLM) -> None:
    cache = llm.engine.cache
    assert llm.engine.idle
    assert cache.bytes_in_use == cache.host_bytes_in_use == 0


@pytest.mark.parametrize("failing", [FailingEvict(), FailingSelect(), FailingPrefill()], ids=str)
def test_a_method_that_fails_ends_its_own_request_only(
    failing: Evict | Select | Prefill, make: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    llm, plenty = make(), make()
    plans = [
        Plan(),
        Plan((failing,)),
        Plan.parse("h2o(budget=0.3)"),
        Plan.parse("kivi(group_size=16)"),
    ]
    before, failed, *others = llm.generate([prompts[2]] * 4, PARAMS, plans)
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "today" in failed.error
    for output, plan in zip([before, *others], [plans[0], *plans[2:]], strict=True):
        [alone] = plenty.generate([prompts[2]], PARAMS, plan)
        assert (output.error, output.token_ids) == (None, alone.token_ids)
    assert_empty(llm)


def test_the_engine_goes_on_after_a_method_failed(
    make: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    llm = make()
    for failing in (FailingEvict(), FailingSelect(), FailingPrefill(), WrongShape()):
        [output] = llm.generate([prompts[2]], PARAMS, Plan((failing,)))
        assert output.finish_reason == "error"
        assert_empty(llm)
    [dense] = llm.generate([prompts[2]], PARAMS)
    [expected] = make().generate([prompts[2]], PARAMS)
    assert dense.token_ids == expected.token_ids


@pytest.mark.parametrize("name", ["duoattention", "razorattention"])
def test_what_is_not_fitted_is_refused_with_the_command_that_fits(
    name: str, tiny_dir: Callable[[str], object], prompts: list[list[int]]
) -> None:
    directory = tiny_dir("llama")
    llm = LLM(load_model(directory, dtype="float32"), kv_memory="8MiB")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=f"run `tamis train {name} --model {directory}`"):
        llm.generate([prompts[0]], PARAMS, f"{name}()")
    assert_empty(llm)


@pytest.mark.parametrize(
    ("plan", "right"),
    [
        ("kivi(group_size=32)", "group_size=16 would"),
        ("gear(group_size=64)", "group_size=16 would"),
        ("gear(group_size=16, rank=40)", "rank must be at most 16"),
        ("think(ratio=0.99)", "ratio must be at most 0.9375"),
    ],
)
def test_a_codec_that_does_not_fit_says_what_would(
    plan: str, right: str, make: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    """Pages of 16 tokens, heads of 16 channels."""
    llm = make()
    with pytest.raises(PlanError, match=right):
        llm.generate([prompts[0]], PARAMS, plan)
    assert_empty(llm)
    [output] = llm.generate([prompts[0]], PARAMS, "kivi(group_size=16)")
    assert output.error is None


def test_positions_in_the_cache_need_keys_that_can_be_moved(
    make: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    """The rotations of dynamic RoPE depend on the length, so no key can be moved alone."""
    llm = make("llama-dynamic")
    with pytest.raises(PlanError, match="in-cache positions can be switched off"):
        llm.generate([prompts[3]], PARAMS, "streamingllm(budget=48)")
    assert_empty(llm)
    [output] = llm.generate([prompts[3]], PARAMS, "streamingllm(budget=48, in_cache=False)")
    assert output.finish_reason == "length"


def test_prompt_logprobs_need_every_token_at_the_last_layer(
    make: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    llm = make()
    with pytest.raises(RequestError, match="prompt_logprobs need every token"):
        llm.generate([prompts[0]], SamplingParams(prompt_logprobs=1), "gemfilter(budget=0.3)")
    assert_empty(llm)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("snapkw(budget=0.1)", "did you mean 'snapkv'"),
        ("snapkv(budgets=0.1)", "did you mean 'budget'"),
        ("snapkv(budget=1.5)", "at most 1"),
        ("snapkv(budget=0.1) +", "is not a plan"),
        ("snapkv(budget=0.1) + h2o()", "both decide the stage 'evict'"),
        ("duoattention(path='/nowhere.safetensors')", "duoattention"),
    ],
)
def test_one_wrong_plan_of_many_runs_nothing(
    plan: str, message: str, make: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    llm = make()
    with pytest.raises(PlanError, match=message):
        llm.generate(prompts[:2], PARAMS, ["snapkv(budget=0.3, window=8)", plan])
    assert_empty(llm)
    assert llm.engine.stats.steps == 0
