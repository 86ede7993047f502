"""Requests over contexts come, go and are preempted at random; none says anything else for it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tamis import SamplingParams
from tamis.model import Model
from tamis.plan import Plan
from tests.methods.reuse.conftest import add, make, words

PLANS = (
    "promptcache()",
    "cacheblend(recompute=0.3)",
    "cacheblend(recompute=0.6) + snapkv(budget=0.5, window=8)",
    "promptcache() + kivi(group_size=4, residual=8)",
    "promptcache() + quest(pages=5)",
    "dense",
)
DOCUMENTS = [words(n, n) for n in (24, 9, 31, 17)]


def draw(rng: random.Random, contexts: list[str]) -> tuple[list[int], SamplingParams, str, Any]:
    """A request: its prompt, what is asked of it, its plan and its contexts."""
    plan = rng.choice(PLANS)
    named = rng.choices(contexts, k=rng.randint(1, 4)) if plan != "dense" else None
    prompt = words(rng.randint(1, 20), rng.randrange(1000))
    params = SamplingParams(max_tokens=rng.randint(8, 24), ignore_eos=True, n=rng.choice((1, 1, 2)))
    return prompt, params, plan, named


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_traffic_changes_no_output(
    llama: Model, preemption: Any, prefix_cache: bool, seed: int
) -> None:
    rng = random.Random(seed)
    wide = make(llama)
    in_wide = add(wide, DOCUMENTS)
    llm = make(
        llama,
        kv_memory=wide.engine.cache.required_bytes(sum(map(len, DOCUMENTS)) + 240, chunk=16),
        max_batch_tokens=16,
        preemption=preemption,
        prefix_cache=prefix_cache,
    )
    contexts = add(llm, DOCUMENTS)
    asked, outputs, aborted, preempted = {}, {}, set(), 0
    while len(asked) < 24 or not llm.engine.idle:
        if len(asked) < 24 and rng.random() < 0.9:
            prompt, params, plan, named = draw(rng, contexts)
            name = llm.engine.add_request(prompt, params, Plan.parse(plan), context=named)
            asked[name] = (prompt, params, plan, named)
        if asked and rng.random() < 0.05:
            name = rng.choice([*asked])
            aborted.add(name)
            llm.engine.abort(name)
        for increment in llm.engine.step() if not llm.engine.idle else []:
            if increment.output is not None:
                outputs[increment.request_id] = increment.output
                preempted += increment.output.metrics.preemptions
    assert preempted > 0
    assert len(outputs.keys() - aborted) > 10
    same = dict(zip(contexts, in_wide, strict=True))
    for name in outputs.keys() - aborted:
        prompt, params, plan, named = asked[name]
        named = None if named is None else [same[context] for context in named]
        [wanted] = wide.generate([prompt], params, plan, context=named)
        assert outputs[name].error is None
        said = [completion.token_ids for completion in outputs[name].completions]
        assert said == [completion.token_ids for completion in wanted.completions], plan
    for context in contexts:
        llm.delete_context(context)
    llm.engine.prefixes.tree.clear()
    assert llm.engine.cache.bytes_in_use == 0
    assert llm.engine.cache.swap_bytes_in_use == 0
