"""Hidden states of tokens that wait on their way through the layers are charged to their request,
and are dropped when no token can go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tamis import LLM, Plan, SamplingParams
from tamis.engine.engine import Engine
from tamis.engine.sequence import Sequence

Make = Callable[..., LLM]

HIDDEN_STATE = 64 * 4
"""Bytes of one token's, of the tiny Llama in fp32."""

LAZY = "lazyllm(keep=0.5, prunings=1, first=0.34)"
"""Half of the tokens wait at the second of three layers."""


def first_token(engine: Engine, prompt: list[int], plan: str, n: int = 1) -> list[Sequence]:
    """The sequences of a request whose prompt has just been computed."""
    params = SamplingParams(max_tokens=20, ignore_eos=True, n=n, temperature=float(n > 1), seed=0)
    engine.add_request(prompt, params, Plan.parse(plan))
    while not engine.step():
        pass
    return engine.scheduler.running


def finish(engine: Engine) -> None:
    """Run what is left."""
    while not engine.idle:
        engine.step()


@pytest.mark.parametrize("chunk", [2048, 48], ids=["whole", "chunked"])
def test_what_waits_is_charged_beside_the_pages(
    chunk: int, make: Make, prompts: list[list[int]]
) -> None:
    engine = make(max_batch_tokens=chunk).engine
    [sequence] = first_token(engine, prompts[0], LAZY)
    assert sequence.cache is not None
    n, held = len(prompts[0]), int(sequence.cache.lengths[-1])
    assert held == n // 2
    assert sequence.request.kv_bytes == sequence.cache.bytes + (n - held) * HIDDEN_STATE
    finish(engine)


def test_branches_share_what_waited_when_they_parted(make: Make, prompts: list[list[int]]) -> None:
    engine = make(max_running=8).engine
    sequences = first_token(engine, prompts[0], LAZY, n=3)
    caches = [s.cache for s in sequences if s.cache is not None]
    assert len(caches) == 3
    engine._measure(sequences[0].request)
    waiting = len(prompts[0]) // 2 * HIDDEN_STATE
    assert sequences[0].request.kv_bytes == engine.cache.distinct_bytes(caches) + waiting
    finish(engine)


@pytest.mark.parametrize(
    "plan", ["gemfilter(layer=1, budget=0.4)", "pyramidinfer(decay=0.5, minimum=8, queries=16)"]
)
def test_nothing_waits_once_the_prompt_is_computed_by_programs_without_steps(
    plan: str, make: Make, prompts: list[list[int]]
) -> None:
    engine = make().engine
    [sequence] = first_token(engine, prompts[0], plan)
    assert sequence.life is not None
    assert sequence.life.aside.waiting == []
    assert sequence.cache is not None
    waited = len(prompts[0]) - int(sequence.cache.lengths[-1])
    assert waited > 0
    assert sequence.request.kv_bytes_peak >= sequence.cache.bytes + waited * HIDDEN_STATE
    engine.step()
    assert sequence.request.kv_bytes == sequence.cache.bytes
    finish(engine)
