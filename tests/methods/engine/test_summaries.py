"""Summaries of pages follow the pages, whatever each head holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tamis import LLM, SamplingParams
from tamis.engine import stores
from tamis.engine.lifecycle import Lifecycle
from tamis.plan import Plan
from tests.methods.engine.plans import PAGE


def assert_true_to_keys(life: Lifecycle) -> None:
    """Every full live page's summaries are those of its keys, and lie after the encoded ones'."""
    for layer, shape in enumerate(life.shape.layers):
        k, _ = life.cache.keys_values(layer)
        lengths = life.cache.lengths[life.cache.layout.rows(layer)].tolist()
        encoded = (stores.encoded_lengths(life, layer) // PAGE).tolist()
        low, high = (stores.summary(life, layer, name) for name in ("k_min", "k_max"))
        for head in range(shape.kv_heads):
            for page in range(lengths[head] // PAGE):
                least, most = k[head, page * PAGE : (page + 1) * PAGE].aminmax(dim=0)
                assert torch.equal(low[head, encoded[head] + page], least)
                assert torch.equal(high[head, encoded[head] + page], most)


@pytest.mark.parametrize(
    "plan",
    [
        "quest(pages=2)",
        "snapkv(budget=0.5, window=4) + headadaptive + quest(pages=2)",
        "duoattention(sinks=2, recent=9) + quest(pages=2)",
        "kivi(residual=16, group_size=16) + quest(pages=2)",
        "duoattention(sinks=2, recent=9) + kivi(residual=16, group_size=16) + quest(pages=2)",
    ],
)
def test_they_are_those_of_the_keys_after_every_step(
    make: Callable[..., LLM], prompts: list[list[int]], plan: str
) -> None:
    """Heads of different lengths fill their pages at different steps."""
    engine = make().engine
    params = SamplingParams(max_tokens=3 * PAGE, ignore_eos=True)
    engine.add_request(prompts[1], params, Plan.parse(plan))
    ragged = False
    while not engine.idle:
        engine.step()
        for sequence in engine.scheduler.running:
            if sequence.life is not None and sequence.life.generating:
                assert_true_to_keys(sequence.life)
                ragged |= len(set((sequence.life.cache.lengths % PAGE).tolist())) > 1
    assert ragged or "snapkv" not in plan
