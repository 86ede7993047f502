"""What is recorded of a request is what its plan did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tamis import LLM, Inspection, Plan, SamplingParams
from tamis.errors import RequestError
from tamis.methods.tokens.gemfilter import GemFilter
from tamis.methods.tokens.lazyllm import LazyLLM

HIDDEN = 64
"""Width of the tiny Llama's hidden states."""

N, NEW = 200, 6
PROMPT = [(7 * i * i + 3 * i) % 256 for i in range(N)]
CACHED = N + NEW - 1
"""The last generated token's keys and values are never computed."""
PARAMS = SamplingParams(max_tokens=NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def open_llm(tiny_dir: Callable[[str], Path]) -> Callable[..., LLM]:
    def made(name: str = "llama", **changes: Any) -> LLM:
        settings = {"dtype": "float32", "kv_memory": "8MiB", "page_size": 16}
        return LLM(tiny_dir(name), **settings | changes)

    return made


@pytest.fixture(scope="module")
def llm(open_llm: Callable[..., LLM]) -> LLM:
    return open_llm(max_batch_tokens=64)  # the prompt goes in chunks


def heads(inspection: Inspection) -> list[np.ndarray]:
    return [head for layer in inspection.positions for head in layer]


def test_dense_keeps_computes_and_reads_everything(llm: LLM) -> None:
    found = llm.inspect(PROMPT, params=PARAMS)

    assert found.output_token_ids == tuple(llm.generate(PROMPT, PARAMS)[0].token_ids)
    assert len(heads(found)) == 6
    assert all((head == np.arange(CACHED)).all() for head in heads(found))
    assert found.density == pytest.approx((1, 1, 1))
    assert found.budgets is None
    assert [list(layer) for layer in found.bytes] == [["live"]] * 3
    assert sum(found.dense_bytes) == found.metrics.kv_bytes_dense == found.metrics.kv_bytes
    steps = found.steps()
    assert steps.generated.tolist() == list(range(NEW - 1))
    assert (steps.tokens == steps.dense).all()
    assert (steps.dense[:, 0] == N + 1 + np.arange(NEW - 1)).all()


@pytest.mark.parametrize(
    "plan",
    [
        "dense",
        "snapkv(budget=0.3)",
        "snapkv(budget=0.5) + headadaptive()",
        "kivi(group_size=16, residual=32)",
        "snapkv(budget=0.5) + kivi(group_size=16, residual=32) + quest(pages=3)",
        "minicache(start=0.0)",
        "h2o(budget=0.2)",
        "lazyllm(keep=0.5)",
        "pyramidinfer(decay=0.5, minimum=8)",
    ],
)
def test_bytes_add_up_to_what_the_request_was_charged(llm: LLM, plan: str) -> None:
    found = llm.inspect(PROMPT, plan, PARAMS)
    assert sum(sum(layer.values()) for layer in found.bytes) == found.metrics.kv_bytes
    assert found.plan == str(llm.plan.parse(plan))


def test_what_waits_is_found_where_it_waits(llm: LLM) -> None:
    found = llm.inspect(PROMPT, Plan((LazyLLM(keep=0.5, prunings=1, first=0.34),)), PARAMS)
    wait = CACHED - len(found.positions[1][0])
    assert [layer.get("waiting", 0) for layer in found.bytes] == [0, wait * HIDDEN * 4, 0]
    assert wait > 0  # the others were taken along by a generated token


def test_an_eviction_keeps_its_budget_and_what_was_generated(llm: LLM) -> None:
    found = llm.inspect(PROMPT, "streamingllm(budget=40, sinks=4)", PARAMS)
    assert found.budgets == ((40, 40),) * 3
    expected = [*range(4), *range(CACHED - 36, CACHED)]
    assert all(head.tolist() == expected for head in heads(found))
    assert found.density[0] < 0.6  # chunks attend to what is left of those before
    assert (found.steps().tokens <= 41).all()


def test_budgets_are_those_that_a_method_shared_out(llm: LLM) -> None:
    found = llm.inspect(PROMPT, "snapkv(budget=0.3) + headadaptive()", PARAMS)
    assert found.budgets is not None
    assert {sum(layer) for layer in found.budgets} == {2 * round(0.3 * N)}
    allotted = [budget for layer in found.budgets for budget in layer]
    assert [len(head) - (NEW - 1) for head in heads(found)] == allotted
    assert len(set(allotted)) > 1


def test_encoded_tokens_are_found_where_some_were_dropped(llm: LLM) -> None:
    alone = llm.inspect(PROMPT, "snapkv(budget=0.5)", PARAMS)
    coded = llm.inspect(PROMPT, "snapkv(budget=0.5) + kivi(group_size=16, residual=16)", PARAMS)
    assert all(layer["codec"] > 0 for layer in coded.bytes)
    assert (alone.kept()[:2] == coded.kept()[:2]).all()  # what a later layer keeps may differ
    assert all(len(head) == N // 2 + NEW - 1 for head in heads(coded))
    assert all((np.diff(head) > 0).all() for head in heads(coded))


@pytest.mark.parametrize(
    ("plan", "store"),
    [
        ("minicache(start=0.0)", "share"),
        ("headinfer()", "host"),
        ("kivi(group_size=16, residual=32)", "codec"),
    ],
)
def test_tokens_in_stores_are_kept_tokens(llm: LLM, plan: str, store: str) -> None:
    found = llm.inspect(PROMPT, plan, PARAMS)
    assert any(store in layer for layer in found.bytes)
    assert all((head == np.arange(CACHED)).all() for head in heads(found))
    assert (found.steps().share == 1).all()
    assert found.density == pytest.approx((1, 1, 1))


def test_chosen_pages_are_recorded_with_their_tokens(llm: LLM) -> None:
    plan = "quest(pages=3, skip_layers=1)"
    found = llm.inspect(PROMPT, plan, PARAMS)
    for read in found.reads:
        if read.layer == 0:
            assert read.pages is None
            assert read.tokens == read.cached
            continue
        assert read.pages is not None
        for pages, tokens, cached in zip(read.pages, read.tokens, read.cached, strict=True):
            n_pages = -(-cached // 16)
            assert len(pages) == 3
            assert max(pages) == n_pages - 1  # the newest page is always among them
            assert tokens == 2 * 16 + cached - 16 * (n_pages - 1)


def test_chosen_pages_are_counted_among_encoded_ones_too(llm: LLM) -> None:
    plan = "quest(pages=3, skip_layers=0) + kivi(group_size=16, residual=32)"
    found = llm.inspect(PROMPT, plan, PARAMS)
    for read in found.reads:
        expected = [2 * 16 + (cached - 1) % 16 + 1 for cached in read.cached]
        assert list(read.tokens) == expected
        assert read.cached == (N + 1 + read.step,) * 2


def test_single_tokens_touch_the_pages_they_lie_in(llm: LLM) -> None:
    found = llm.inspect(PROMPT, "tokenselect(k=4, n_init=2, n_local=6)", PARAMS)
    chosen = [read for read in found.reads if read.pages is not None]
    assert chosen
    for read in chosen:
        for pages, tokens, cached in zip(read.pages or (), read.tokens, read.cached, strict=True):
            assert tokens == 12
            assert {0, (cached - 1) // 16} <= set(pages)
            assert len(pages) <= tokens


def test_tokens_that_were_moved_together_keep_their_numbers(llm: LLM) -> None:
    found = llm.inspect(PROMPT, Plan((GemFilter(budget=50, layer=1),)), PARAMS)
    first = heads(found)[0]
    assert all((head == first).all() for head in heads(found))
    assert first.tolist()[-NEW:] == list(range(N - 1, CACHED))  # the prompt's last, the generated
    assert len(first) == 50 + NEW - 1
    assert (np.diff(first) > 1).any()
    chosen = (50 * 51) / (N * (N + 1))
    assert found.density == pytest.approx((1 + chosen, 1 + chosen, chosen))  # two passes below


def test_a_pass_counts_the_tokens_that_it_sees(llm: LLM) -> None:
    found = llm.inspect(PROMPT, Plan((LazyLLM(),)), SamplingParams(max_tokens=1))
    for heads_of_layer, density in zip(found.positions, found.density, strict=True):
        n = len(heads_of_layer[0])
        assert density == pytest.approx(n * (n + 1) / (N * (N + 1)))
    assert len(heads(found)[-1]) < N
    longer = llm.inspect(PROMPT, Plan((LazyLLM(),)), PARAMS)
    assert 0 < longer.steps().share[:, -1].max() < 1
    assert longer.read_share(range(3, 5)) is None


def test_windows_are_no_loss_of_the_plan(open_llm: Callable[..., LLM]) -> None:
    found = open_llm("mistral", max_batch_tokens=50).inspect(PROMPT, params=PARAMS)
    assert set(found.windows) == {16}
    assert found.density == pytest.approx((1, 1, 1))
    assert (found.steps().share == 1).all()
    assert all(head[-1] == CACHED - 1 and head[0] > 0 for head in heads(found))
    assert sum(found.dense_bytes) == found.metrics.kv_bytes_dense


def test_a_prompt_that_ends_with_a_chunk_of_one_token_is_all_prompt(
    open_llm: Callable[..., LLM],
) -> None:
    found = open_llm(max_batch_tokens=N - 1).inspect(PROMPT, params=PARAMS)
    assert found.density == pytest.approx((1, 1, 1))
    assert found.steps().generated.tolist() == list(range(NEW - 1))


def test_drafts_are_read_with_the_steps_that_verify_them(llm: LLM) -> None:
    repeated = [5, 6, 7, 8] * 20
    found = llm.inspect(
        repeated, "tokenrecycling()", SamplingParams(max_tokens=30, ignore_eos=True)
    )
    assert (np.diff(found.steps().generated) > 0).all()
    assert (found.steps().share == 1).all()
    for head in heads(found):  # what the last step accepted is not counted, nor what it rejected
        assert head.tolist() == list(range(len(head)))
        assert len(repeated) + found.steps().generated[-1] == len(head)


def test_what_was_computed_again_is_recorded_once(open_llm: Callable[..., LLM]) -> None:
    # This model's position embeddings change at 32 tokens, and the cache is built anew.
    llm = open_llm("phi3-longrope")
    found = llm.inspect(PROMPT[:28], params=SamplingParams(max_tokens=10, ignore_eos=True))
    assert found.density == pytest.approx((1, 1, 1))
    assert len({(read.step, read.layer) for read in found.reads}) == len(found.reads)
    assert len(heads(found)[0]) == 28 + 9


def test_one_completion_is_followed_and_a_failure_is_told(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n=2 must be 1"):
        llm.inspect(PROMPT, params=SamplingParams(n=2, temperature=1.0))
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.inspect([])
    assert llm.engine.idle


def test_an_inspected_request_does_not_change_its_neighbours(llm: LLM) -> None:
    stream = llm.stream(PROMPT[:50], PARAMS)
    first = next(stream)
    llm.inspect(PROMPT, "snapkv(budget=0.2)", PARAMS)
    rest = [token for increment in stream for token in increment.token_ids]
    assert [*first.token_ids, *rest] == llm.generate(PROMPT[:50], PARAMS)[0].token_ids
