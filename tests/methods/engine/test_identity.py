"""A method that is set to change nothing changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tamis import LLM, SamplingParams
from tamis.engine.outputs import RequestOutput
from tamis.methods.registry import methods
from tests.methods.engine.plans import CASES, LOSSLESS

NEW_TOKENS = 10
MODELS = ("llama", "gemma3", "qwen3", "gpt-oss")
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=264)
SAMPLED = SamplingParams(
    max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=264, temperature=1.0, top_p=0.9, seed=11
)


def assert_equal(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """The same tokens, with the same log-probabilities of the whole vocabulary."""
    for output, reference in zip(outputs, expected, strict=True):
        assert output.error is None
        assert output.token_ids == reference.token_ids
        assert output.logprobs is not None
        assert reference.logprobs is not None
        for entry, other in zip(output.logprobs, reference.logprobs, strict=True):
            mine, theirs = dict(entry.top), dict(other.top)
            assert mine.keys() == theirs.keys()
            values = torch.tensor([mine[token] for token in theirs])
            expected_values = torch.tensor([*theirs.values()])
            torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def dense(
    llms: Callable[..., LLM], prompts: list[list[int]]
) -> Callable[[str, SamplingParams], list[RequestOutput]]:
    """`dense(model, params)`: what exact attention yields."""
    known: dict[tuple[str, SamplingParams], list[RequestOutput]] = {}

    def run(name: str, params: SamplingParams) -> list[RequestOutput]:
        if (name, params) not in known:
            known[name, params] = llms(name).generate(prompts[:2], params)
        return known[name, params]

    return run


def test_every_method_has_a_case() -> None:
    assert list(CASES) == list(methods())


@pytest.mark.parametrize("chunk", [2048, 48], ids=["whole", "chunked"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_keeping_everything_is_exact(
    name: str,
    model: str,
    chunk: int,
    llms: Callable[..., LLM],
    prompts: list[list[int]],
    dense: Callable[[str, SamplingParams], list[RequestOutput]],
) -> None:
    llm = llms(model, max_batch_tokens=chunk)
    outputs = llm.generate(prompts[:2], GREEDY, CASES[name].exact_plan)
    assert_equal(outputs, dense(model, GREEDY))
    assert llm.engine.cache.bytes_in_use == llm.engine.cache.host_bytes_in_use == 0


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_methods_are_exact_by_default(
    name: str,
    model: str,
    params: SamplingParams,
    llms: Callable[..., LLM],
    prompts: list[list[int]],
    dense: Callable[[str, SamplingParams], list[RequestOutput]],
) -> None:
    """Twice, since what the first run left behind (candidates, say) must not matter either."""
    llm = llms(model)
    for _ in range(2):
        assert_equal(llm.generate(prompts[:2], params, f"{name}()"), dense(model, params))
    if name == "tokenrecycling" and params is GREEDY:
        assert llm.engine.stats.accepted > 0, "no draft was ever right: verification is not tested"
