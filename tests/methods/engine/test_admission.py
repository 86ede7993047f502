"""What a request is expected to take before it is let in is what it takes, in layers with a sliding
window too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tamis import LLM, Plan, SamplingParams
from tamis.engine.memory import prompt_bytes
from tamis.errors import KVMemoryError

Make = Callable[..., LLM]

CHUNK = 48
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
WHOLE = ["lazyllm(keep=1.0)", "gemfilter(budget=4096)", "pyramidinfer(decay=1.0, generated=1.0)"]
"""Programs of passes that keep every token in every layer."""
PRUNING = ["lazyllm(keep=0.5)", "gemfilter(layer=1, budget=0.4)", "pyramidinfer(decay=0.5)"]


def peak(llm: LLM, prompt: list[int], plan: str) -> tuple[int, int]:
    """Bytes that a request was expected to take for its prompt, and that it took at the most."""
    engine = llm.engine
    expected = prompt_bytes(engine.cache, engine.shape, Plan.parse(plan), len(prompt), CHUNK)
    engine.add_request(prompt, PARAMS, Plan.parse(plan))
    while not engine.step():
        pass
    return expected, engine.cache.bytes_peak


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("plan", WHOLE)
def test_a_program_holds_its_prompt_whole_until_it_ends(
    plan: str, name: str, make: Make, prompts: list[list[int]]
) -> None:
    expected, taken = peak(make(name, max_batch_tokens=CHUNK), prompts[0], plan)
    assert taken == expected


@pytest.mark.parametrize("plan", PRUNING)
def test_pruning_programs_take_no_more_than_expected(
    plan: str, make: Make, prompts: list[list[int]]
) -> None:
    expected, taken = peak(make("gemma3", max_batch_tokens=CHUNK), prompts[0], plan)
    assert taken <= expected


@pytest.mark.parametrize("plan", WHOLE[:1] + PRUNING)
def test_the_memory_that_a_refusal_names_suffices(
    plan: str, make: Make, prompts: list[list[int]]
) -> None:
    prompt = prompts[0]
    with pytest.raises(KVMemoryError, match="would do") as refused:
        make("gemma3", max_batch_tokens=CHUNK, kv_memory=2**17).generate(prompt, PARAMS, plan)
    enough = int(str(refused.value).split("kv_memory=")[1].split()[0])
    llm = make("gemma3", max_batch_tokens=CHUNK, kv_memory=enough)
    [output] = llm.generate(prompt, SamplingParams(max_tokens=1), plan)
    assert output.error is None
    assert output.metrics.preemptions == 0
