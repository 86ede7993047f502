"""What a request yields depends on nothing but the request: batches, preemption, forks."""

from __future__ import annotations

import pytest

from tamis import LLM, SamplingParams
from tamis.engine.outputs import RequestOutput
from tamis.model import Model

GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, top_p=0.9, seed=7)


def make(model: Model, **settings: object) -> LLM:
    return LLM(model, **({"kv_memory": "16MiB", "page_size": 4} | settings))  # type: ignore[arg-type]


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[c.token_ids for c in output.completions] for output in outputs]


@pytest.fixture(scope="module")
def alone(llama: Model, prompts: list[list[int]]) -> dict[SamplingParams, list[list[list[int]]]]:
    """Each prompt's output when nothing else runs."""
    llm = make(llama)
    return {
        params: [tokens(llm.generate([prompt], params))[0] for prompt in prompts]
        for params in (GREEDY, SAMPLED)
    }


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_yields_what_each_prompt_yields_alone(
    llama: Model,
    prompts: list[list[int]],
    alone: dict[SamplingParams, list[list[list[int]]]],
    params: SamplingParams,
) -> None:
    assert tokens(make(llama).generate(prompts, params)) == alone[params]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("preemption", "swap_memory"), [("recompute", None), ("swap", "16MiB"), ("swap", "8KiB")]
)
def test_preemption_changes_no_token(
    llama: Model,
    prompts: list[list[int]],
    alone: dict[SamplingParams, list[list[list[int]]]],
    params: SamplingParams,
    preemption: str,
    swap_memory: str | None,
) -> None:
    """Memory for the longest request and little more, so that the others must give way; a swap
    space of 8 KiB is too small for any of them, so that they are recomputed."""
    room = make(llama).engine.cache.required_bytes(90 + 30, chunk=16)
    llm = make(
        llama,
        kv_memory=room,
        max_batch_tokens=16,
        preemption=preemption,
        swap_memory=swap_memory,
    )
    outputs = llm.generate(prompts, params)
    assert tokens(outputs) == alone[params]
    assert llm.engine.stats.preemptions > 0
    assert sum(o.metrics.preemptions for o in outputs) == llm.engine.stats.preemptions
    assert llm.engine.cache.bytes_in_use == 0
    assert llm.engine.cache.swap_bytes_in_use == 0


def test_branches_share_the_prompts_pages(llama: Model, prompts: list[list[int]]) -> None:
    llm = make(llama, page_size=16)
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=3, n=4)
    one = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=3)
    [output], [single] = llm.generate([prompts[4]], params), llm.generate([prompts[4]], one)
    branches = [c.token_ids for c in output.completions]
    assert [c.index for c in output.completions] == [0, 1, 2, 3]
    assert branches[0] == single.token_ids
    assert len({tuple(b) for b in branches}) > 1
    # 90 tokens are 5 full pages, shared, and one partly filled, which each branch copies.
    page = llm.engine.layout.bytes_for(16)
    assert single.metrics.kv_bytes_peak == 6 * page
    assert output.metrics.kv_bytes_peak == (5 + 4) * page
    assert llm.engine.cache.bytes_in_use == 0


def test_greedy_branches_are_equal(llama: Model, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, n=3)
    [output] = make(llama).generate([prompts[2]], params)
    first, *others = (c.token_ids for c in output.completions)
    assert others == [first, first]


def test_branches_survive_preemption(llama: Model, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=5, n=3)
    free = tokens(make(llama).generate(prompts[:3], params))
    room = make(llama).engine.cache.required_bytes(40 + 40, chunk=16)
    for preemption in ("swap", "recompute"):
        llm = make(llama, kv_memory=room, max_batch_tokens=16, preemption=preemption)
        assert tokens(llm.generate(prompts[:3], params)) == free
        assert llm.engine.stats.preemptions > 0


def test_a_seed_reproduces_and_other_seeds_differ(llama: Model, prompts: list[list[int]]) -> None:
    llm = make(llama)

    def run(seed: int) -> list[int]:
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)
        return llm.generate([prompts[1]], params)[0].token_ids

    assert run(1) == run(1) != run(2)


def test_pages_in_use_equal_the_formula(llama: Model, prompts: list[list[int]]) -> None:
    """Whole pages per head: K, V and the positions, and nothing else."""
    llm = make(llama, page_size=16)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=9, ignore_eos=True))
    spec = llama.layers[0]
    row_bytes = (spec.k_dim + spec.v_dim) * 4 + 4
    for prompt, output in zip(prompts, outputs, strict=True):
        pages = -(-(len(prompt) + 8) // 16)  # the last token's KV is never computed
        heads = sum(layer.kv_heads for layer in llama.layers)
        assert output.metrics.kv_bytes == pages * 16 * row_bytes * heads
        assert output.metrics.kv_bytes_dense == output.metrics.kv_bytes


def test_a_window_bounds_the_pages_of_its_layers(load, prompts: list[list[int]]) -> None:
    """Mistral's tiny window of 16 tokens: two pages of 16 per head hold it wherever it lies."""
    model = load("mistral")
    llm = make(model, page_size=16, max_batch_tokens=16)
    [output] = llm.generate([prompts[4]], SamplingParams(max_tokens=20, ignore_eos=True))
    one_page = llm.engine.layout.bytes_for(1)
    assert output.metrics.kv_bytes <= 2 * one_page
    assert output.metrics.kv_bytes_peak <= 3 * one_page  # window and chunk
