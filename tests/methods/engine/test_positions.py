"""Keys that attend from positions within the cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tamis import LLM, SamplingParams
from tamis.plan import Plan

PROMPT, BUDGET, SINKS = 10, 12, 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_are_turned_from_what_they_were_computed_as_however_often(
    dtype: str, make: Callable[..., LLM]
) -> None:
    """Sixty evictions later the sinks' keys are those of the prompt, turned and rounded once."""
    llm = make("llama", dtype)
    params = SamplingParams(max_tokens=70, ignore_eos=True)
    plan = f"streamingllm(budget={BUDGET}, sinks={SINKS})"
    llm.engine.add_request(list(range(1, PROMPT + 1)), params, Plan.parse(plan))
    while not llm.engine.step():
        pass
    [sequence] = llm.engine.scheduler.running
    cache, model = sequence.cache, llm.engine.model
    assert cache is not None
    layers = range(len(model.layers))
    computed = [cache.keys_values(layer, 0, SINKS)[0] for layer in layers]
    for _ in range(60):
        llm.engine.step()
    newest = cache.next_position - 1
    delta = torch.full((SINKS,), newest - BUDGET + 1)
    for layer in layers:
        for head in range(len(computed[layer])):
            kept = cache.positions(layer, head).tolist()
            recent = range(newest - (BUDGET - SINKS) + 1, newest + 1)
            assert kept == [*range(SINKS), *recent]
        turned = model.shift_keys(layer, computed[layer], delta)
        torch.testing.assert_close(cache.keys_values(layer, 0, SINKS)[0], turned, rtol=0, atol=0)
