"""Requests that come, fork, are aborted and give way at random yield what they yield alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tamis import LLM, SamplingParams
from tamis.engine.outputs import RequestOutput
from tamis.model import Model

STEPS = 250


def draw_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = [rng.randrange(256) for _ in range(rng.choice([1, 5, 20, 60]))]
    params = SamplingParams(
        max_tokens=rng.choice([1, 7, 30]),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 3]),
        ignore_eos=True,
    )
    return prompt, params


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_traffic_changes_no_output(load: Any, name: str, preemption: str, seed: int) -> None:
    model: Model = load(name)
    rng = random.Random(seed)
    free = LLM(model, kv_memory="16MiB", page_size=4)
    room = free.engine.cache.required_bytes(140, chunk=24)
    engine = LLM(
        model,
        kv_memory=room,
        page_size=4,
        max_batch_tokens=24,
        max_running=6,
        preemption=preemption,
        swap_memory=room // 3,
    ).engine
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    outputs: dict[str, RequestOutput] = {}
    aborted: set[str] = set()
    for step in range(STEPS):
        if step < STEPS // 2 and rng.random() < 0.3:
            prompt, params = draw_request(rng)
            asked[engine.add_request(prompt, params)] = (prompt, params)
        if rng.random() < 0.03 and (running := sorted(asked.keys() - outputs.keys())):
            aborted.add(victim := rng.choice(running))
            outputs[victim] = engine.abort(victim)[-1].output  # type: ignore[assignment]
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
        assert engine.cache.bytes_in_use <= room
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}

    assert outputs.keys() == asked.keys()
    assert engine.stats.preemptions > 0
    assert engine.cache.bytes_in_use == engine.cache.swap_bytes_in_use == 0
    for request_id, (prompt, params) in asked.items():
        [alone] = free.generate([prompt], params)
        for mine, reference in zip(
            outputs[request_id].completions, alone.completions, strict=request_id not in aborted
        ):
            if request_id in aborted:
                assert mine.token_ids == reference.token_ids[: len(mine.token_ids)]
            else:
                assert mine == reference
