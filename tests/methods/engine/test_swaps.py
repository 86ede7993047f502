"""Requests that are swapped out again and again yield what they yield undisturbed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tamis import LLM, SamplingParams
from tamis.plan import Plan
from tests.methods.engine.test_batches import PLANS, WHOLE, nothing_held, sampled, tokens

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("name", sampled(3))
def test_swaps_every_few_tokens_change_none(
    name: str, make: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    """Two requests give way in turns, in the middle of a prompt too; host memory for both."""
    llm = make(max_batch_tokens=WHOLE)
    expected = [tokens(llm.generate([prompt], GREEDY, PLANS[name])) for prompt in prompts[1:3]]
    llm = make(max_batch_tokens=WHOLE, preemption="swap", swap_memory="4MiB", host_memory="32MiB")
    engine, copies = llm.engine, llm.engine.cache.copies
    asked = [engine.add_request(p, GREEDY, Plan.parse(PLANS[name])) for p in prompts[1:3]]
    outputs, needed, steps = {}, 0, 0
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
        steps += 1
        running = engine.scheduler.running
        if steps % 3 == 0 and running:
            victim = running[steps % len(running)]
            engine.scheduler._preempt(victim)
            needed += victim.cache.bytes if victim.cache is not None else 0
        assert copies.host.arena.bytes_in_use <= engine.cache.swap_bytes
    assert engine.stats.preemptions > 10
    assert [tokens([outputs[request]]) for request in asked] == expected
    assert nothing_held(llm)
    assert copies.host.arena.bytes_in_use == 0
    assert 0 < copies.copied_bytes <= needed
    if name == "dense":
        assert copies.copied_bytes < needed / 2
