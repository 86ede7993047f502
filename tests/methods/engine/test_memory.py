"""Memory is really freed: bytes in the pool equal the formula, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tamis import LLM, SamplingParams
from tamis.cache import SequenceCache
from tamis.methods.base import resolve
from tamis.methods.registry import methods
from tamis.model import Model, load_model
from tamis.plan import Plan
from tests.methods.engine.plans import CASES, PAGE

Make = Callable[..., LLM]

LAYERS, HEADS, DIM = 3, 2, 16
HIDDEN = 64 * 4
"""Of the tiny Llama; the last is the bytes of a hidden state in fp32."""

ONE = SamplingParams(max_tokens=2, ignore_eos=True)
BUDGETS = [name for name in CASES if methods()[name].stage == "budget"]
CODECS = [name for name in CASES if methods()[name].stage == "codec"]
PER_CHUNK = [name for name in CASES if getattr(methods()[name], "per_chunk", False)]


def align(n_bytes: int) -> int:
    """Fields of a page begin on multiples of 64 bytes."""
    return -(-n_bytes // 64) * 64


def live_page(columns: int) -> int:
    """Bytes of a live page in fp32: keys, values, positions, side columns."""
    return 2 * align(PAGE * DIM * 4) + align(PAGE * 4) + columns


def after_prompt(llm: LLM, prompt: list[int], plan: str) -> SequenceCache:
    """The cache of a request that has just sampled its first token; it goes on running."""
    llm.engine.add_request(prompt, ONE, Plan.parse(plan))
    while not llm.engine.step():
        pass
    [sequence] = llm.engine.scheduler.running
    assert sequence.cache is not None
    return sequence.cache


def finish(llm: LLM) -> None:
    """Run what still runs to its end, and see that no page is left."""
    while not llm.engine.idle:
        llm.engine.step()
    assert llm.engine.cache.bytes_in_use == llm.engine.cache.host_bytes_in_use == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.held is not None])
def test_every_head_holds_the_tokens_of_the_formula(
    name: str, make: Make, prompts: list[list[int]]
) -> None:
    llm, held = make(), CASES[name].held
    assert held is not None
    for prompt in prompts:
        cache = after_prompt(llm, prompt, CASES[name].plan)
        assert cache.lengths.tolist() == [held(len(prompt))] * (LAYERS * HEADS)
        finish(llm)


@pytest.mark.parametrize("chunk", [2048, 48], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_live_bytes_are_whole_pages_of_what_is_held(
    name: str, chunk: int, make: Make, prompts: list[list[int]]
) -> None:
    """Beside the live pages only stores take memory, and the pool knows of nothing else."""
    llm = make(max_batch_tokens=chunk)
    cache = after_prompt(llm, prompts[0], CASES[name].plan)
    page = live_page(CASES[name].columns)
    live = int((-(-cache.lengths // PAGE)).sum()) * page
    stores = sum(store.bytes for n, store in cache.stores.items() if n != "host")
    assert llm.engine.cache.bytes_in_use == cache.bytes == live + stores
    assert llm.engine.cache.host_bytes_in_use == cache.host_bytes
    finish(llm)


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_move_tokens_between_heads_and_keep_their_sum(
    name: str, make: Make, prompts: list[list[int]]
) -> None:
    """As many tokens as the eviction alone keeps, and pages of every head for its own."""
    llm = make()
    n = len(prompts[0])
    lengths = after_prompt(llm, prompts[0], CASES[name].plan).lengths
    assert lengths.sum() == round(0.3 * n) * LAYERS * HEADS
    assert len(set(lengths.tolist())) > 1
    finish(llm)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_streaming_heads_of_duoattention_free_their_memory(
    sparsity: float, make: Make, prompts: list[list[int]]
) -> None:
    llm, n = make(), len(prompts[0])
    plan = f"duoattention(sinks=4, recent=24, sparsity={sparsity})"
    cache = after_prompt(llm, prompts[0], plan)
    streaming = round(sparsity * LAYERS * HEADS)
    assert sorted(cache.lengths.tolist()) == [28] * streaming + [n] * (LAYERS * HEADS - streaming)
    pages = streaming * 2 + (LAYERS * HEADS - streaming) * -(-n // PAGE)
    assert llm.engine.cache.bytes_in_use == pages * live_page(0)
    finish(llm)


def test_razorattention_keeps_one_token_for_all_that_a_head_dropped(
    make: Make, prompts: list[list[int]]
) -> None:
    """One of six heads for each of its two scores is full, and the ones dropped by the others
    lie in a page of one token."""
    llm, n = make(), len(prompts[0])
    cache = after_prompt(llm, prompts[0], "razorattention(sinks=4, buffer=40)")
    streaming = int((cache.lengths == 4 + 40).sum())
    assert streaming in (4, 5)  # the best of both scores may be one head
    assert int((cache.lengths == n).sum()) == LAYERS * HEADS - streaming
    rest = 2 * align(DIM * 4) + align(4)
    pages = streaming * 3 + (LAYERS * HEADS - streaming) * -(-n // PAGE)
    assert llm.engine.cache.bytes_in_use == pages * live_page(0) + streaming * rest
    finish(llm)


def test_kvmerger_keeps_at_most_its_budget(make: Make, prompts: list[list[int]]) -> None:
    llm = make()
    lengths = after_prompt(llm, prompts[0], CASES["kvmerger"].plan).lengths
    assert (lengths <= round(0.4 * len(prompts[0]))).all()
    assert (lengths > 0).all()
    finish(llm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoded_pages_take_the_bytes_of_their_fields(
    dtype: str, make: Make, prompts: list[list[int]]
) -> None:
    """Per encoded page of 16 tokens and 16 channels; scales, zero-points and factors in 16 bits."""
    llm, n = make(dtype=dtype), len(prompts[0])
    codes, scales = PAGE * DIM * 2 // 8, align(DIM * 2)
    kivi = 2 * align(codes) + 2 * scales + 2 * align(PAGE * 2)
    outliers = round(0.02 * PAGE * DIM)
    gear = (
        2 * align(PAGE * DIM * 4 // 8)
        + 2 * scales
        + 2 * align(PAGE * 2)
        + 2 * (align(PAGE * 2 * 2) + align(2 * DIM * 2))
        + 4 * align(outliers * 2)
    )
    element = 4 if dtype == "float32" else 2
    think = align(PAGE * 9 * element) + align(DIM) + align(PAGE * DIM * element)  # 9 = 0.6 * 16
    for name, residual, page in (("kivi", 32, kivi), ("gear", 20, gear), ("think", 16, think)):
        cache = after_prompt(llm, prompts[0], CASES[name].plan)
        assert cache.stores["codec"].bytes == (n - residual) // PAGE * LAYERS * HEADS * page
        finish(llm)


def test_positions_lie_in_encoded_pages_only_where_tokens_were_dropped(
    make: Make, prompts: list[list[int]]
) -> None:
    llm = make()
    page = {}
    for plan in ("kivi(group_size=16, residual=16)", "snapkv(budget=100) + kivi(group_size=16)"):
        cache = after_prompt(
            llm, prompts[0], plan.replace("kivi(group_size=16)", CASES["kivi"].term)
        )
        [format] = set(cache.stores["codec"].formats.values())
        page[plan] = format.page_bytes
        finish(llm)
    assert [*page.values()] == [page[min(page)], page[min(page)] + align(PAGE * 4)]


def test_pages_of_shared_layers_count_once(make: Make, prompts: list[list[int]]) -> None:
    """Of layers 1 and 2 the merged tokens lie in pages of one direction and two lengths."""
    llm, n = make(), len(prompts[0])
    cache = after_prompt(llm, prompts[0], CASES["minicache"].plan)
    merged = int(cache.store_length("share", 1)[0])
    assert 0 < merged < n
    assert cache.store_length("share", 2).tolist() == [merged] * HEADS
    assert cache.lengths.tolist() == [n] * HEADS + [n - merged] * HEADS * 2
    shared = HEADS * -(-merged // PAGE) * (2 * align(PAGE * DIM * 4) + 2 * align(PAGE * 2 * 4))
    assert cache.stores["share"].bytes == shared
    live = HEADS * (-(-n // PAGE) + 2 * -(-(n - merged) // PAGE)) * live_page(0)
    assert llm.engine.cache.bytes_in_use == live + shared
    finish(llm)


@pytest.mark.parametrize("resident", [0.0, 0.5, 1.0])
def test_headinfer_holds_full_pages_in_host_memory(
    resident: float, make: Make, prompts: list[list[int]]
) -> None:
    llm, n = make(max_batch_tokens=48), len(prompts[0])
    after_prompt(llm, prompts[0], f"headinfer(resident={resident})")
    heads = LAYERS * HEADS
    away = heads - round(resident * heads)
    cache = llm.engine.cache
    assert cache.host_bytes_in_use == away * (n // PAGE) * live_page(0)
    assert cache.bytes_in_use == (away + (heads - away) * -(-n // PAGE)) * live_page(0)
    finish(llm)


@pytest.mark.parametrize("name", PER_CHUNK)
@pytest.mark.parametrize("chunk", [32, 64])
def test_prompts_stay_within_the_budget_and_a_chunk(name: str, chunk: int, make: Make) -> None:
    """However long the prompt is, and whatever its end."""
    llm = make(max_batch_tokens=chunk)
    plans = {
        "streamingllm": "streamingllm(budget=80)",
        "h2o": "h2o(budget=80)",
        "scissorhands": "scissorhands(budget=80, history=16, recent=8)",
        "lagkv": "lagkv(budget=80, sinks=4, lag=16)",
    }
    generator = torch.Generator().manual_seed(3)
    for n in (150, 300, 480):
        prompt = torch.randint(0, 256, (n,), generator=generator).tolist()
        [output] = llm.generate([prompt], SamplingParams(max_tokens=1), plans[name])
        pages = -(-(80 + chunk) // PAGE)
        peak = LAYERS * HEADS * pages * live_page(CASES[name].columns)
        assert 0 < output.metrics.kv_bytes_peak <= peak


@pytest.mark.parametrize("name", ["streamingllm", "h2o", "scissorhands"])
def test_generation_stays_within_the_budget_and_an_interval(name: str, make: Make) -> None:
    llm = make()
    plan = Plan.parse(CASES[name].plan)
    assert plan.evict is not None
    assert plan.evict.interval is not None
    most = resolve(plan.evict.budget, 200) + plan.evict.interval
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    llm.engine.add_request([*range(200)], params, plan)
    held = set()
    while not llm.engine.idle:
        llm.engine.step()
        for sequence in llm.engine.scheduler.running:
            assert sequence.cache is not None
            held.add(int(sequence.cache.lengths.max()))
    assert max(held) <= most
    assert len(held) >= plan.evict.interval


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_request_is_told_what_the_pool_held_for_it(
    name: str, n: int, make: Make, prompts: list[list[int]]
) -> None:
    """Pages that branches share count once, those in stores too; beside them, what waits on its way
    through the layers: each token of a branch at one layer at the most."""
    llm = make(max_batch_tokens=96)
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=2, n=n)
    held = []
    llm.engine.add_request(prompts[0], params, Plan.parse(CASES[name].plan))
    outputs = []
    while not llm.engine.idle:
        outputs += [i.output for i in llm.engine.step() if i.output is not None]
        if not llm.engine.idle:
            held.append(llm.engine.cache.bytes_in_use)
    [output] = outputs
    assert output.completions[0].error is None
    most_waiting = n * (len(prompts[0]) + 24) * HIDDEN if methods()[name].stage == "tokens" else 0
    peak = output.metrics.kv_bytes_peak
    assert max(held) <= peak <= llm.engine.cache.bytes_peak + most_waiting
    assert llm.engine.cache.bytes_in_use == 0


def test_streamingllm_generates_beyond_the_models_context(make: Make) -> None:
    """The tiny Llama's is 512 tokens; positions in the cache never come near it."""
    llm = make()
    params = SamplingParams(max_tokens=700, ignore_eos=True)
    [output] = llm.generate([[*range(100)]], params, "streamingllm(budget=48)")
    assert (output.finish_reason, len(output.token_ids)) == ("length", 700)
    assert output.metrics.kv_bytes <= 4 * LAYERS * HEADS * live_page(64)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """`long_model(head_dim, dtype)`: one layer, one KV head, a context of 16k tokens."""

    def build(head_dim: int, dtype: str) -> Model:
        config = LlamaConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=head_dim,
            max_position_embeddings=16384,
        )
        directory: Path = tmp_path_factory.mktemp("long")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(directory)
        return load_model(directory, dtype=dtype, device="cpu")

    return build


def most_at_once(llm: LLM, plan: str, n_requests: int, n_prompt: int) -> int:
    """The most requests that generate at the same time, out of so many that all finish."""
    generator = torch.Generator().manual_seed(4)
    params = SamplingParams(max_tokens=n_requests + 40, ignore_eos=True)
    for _ in range(n_requests):
        prompt = torch.randint(0, 256, (n_prompt,), generator=generator).tolist()
        llm.engine.add_request(prompt, params, Plan.parse(plan))
    most = 0
    while not llm.engine.idle:
        for increment in llm.engine.step():
            if increment.output is not None:
                [completion] = increment.output.completions
                assert (completion.finish_reason, completion.error) == ("length", None)
        holding = [s for s in llm.engine.scheduler.running if s.n_output > 0]
        most = max(most, len(holding))
    return most


@pytest.mark.slow
def test_snapkv_runs_eight_times_the_requests_of_dense(long_model: Callable[..., Model]) -> None:
    """Prompts of 8k tokens, a tenth of them kept, in the memory of twelve dense requests."""
    model = long_model(16, "float32")
    most = {}
    for plan, n_requests in (("dense", 16), ("snapkv(budget=0.1)", 110)):
        sizer = LLM(model, kv_memory="64MiB", page_size=PAGE)
        room = 12 * sizer.engine.cache.required_bytes(8192 + 56)
        llm = LLM(
            model, kv_memory=room, page_size=PAGE, max_batch_tokens=8192 + 256, max_running=256
        )
        most[plan] = most_at_once(llm, plan, n_requests, 8192)
        assert llm.engine.cache.bytes_in_use == 0
    assert 10 <= most["dense"] <= 12
    assert most["snapkv(budget=0.1)"] >= 8 * most["dense"]


@pytest.mark.parametrize("n_prompt", [8192, 8192 + 63])
def test_kivi_stores_a_fifth_of_bf16(long_model: Callable[..., Model], n_prompt: int) -> None:
    """2 bits with scales and zero-points in 16 bits, the residual of the paper and what it lacks
    to whole pages of 64 tokens, positions; head dimension 64."""
    llm = LLM(long_model(64, "bfloat16"), kv_memory="64MiB", max_batch_tokens=1024)
    prompt = np.random.default_rng(0).integers(0, 256, n_prompt).tolist()
    after_prompt(llm, prompt, "kivi(bits=2)")
    dense = n_prompt * 2 * 64 * 2
    assert 0.1875 * dense < llm.engine.cache.bytes_in_use <= 0.21 * dense
    finish(llm)
