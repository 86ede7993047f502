"""The benchmark of the engine runs through and measures what it says."""

from __future__ import annotations

import io
import random
import time

import pytest
import torch
from rich.console import Console

import engine
from contestants import OneByOne
from contestants_tamis import Tamis
from contestants_transformers import Transformers
from memory import peak_growth

MIB = 1 << 20


@pytest.fixture
def prompts(shape):
    source = random.Random(0)
    return [source.choices(range(shape.vocab), k=40) for _ in range(4)]


class Hog:
    """A contestant that takes so many MiB for a while as the prompt has tokens."""

    def __init__(self, directory) -> None:
        self.kv_bytes = 0

    def prefill(self, prompt) -> float:
        torch.ones(len(prompt) * MIB, dtype=torch.uint8)
        return 0.0

    def decode(self, n_tokens) -> float:
        return 0.0


@pytest.mark.slow
def test_growth_is_the_peak_of_a_process_of_its_own(directory):
    held = torch.ones(64 * MIB, dtype=torch.uint8)  # this process's memory does not count
    growth = peak_growth(Hog, directory, [0] * 200, n_tokens=1, threads=1)
    assert growth / MIB == pytest.approx(200, abs=8)
    assert held.numel() == 64 * MIB


def test_both_cache_what_the_formula_says(shape, directory, prompts):
    transformers, tamis = Transformers(directory), Tamis(directory)
    for contestant in (transformers, tamis):
        contestant.prefill(prompts[0])
        contestant.decode(3)
    assert transformers.kv_bytes == shape.kv_bytes(40 + 3)
    heads, page = shape.layers * shape.kv_heads, tamis.page_size
    assert tamis.kv_bytes == shape.kv_bytes(page) + heads * page * engine.POSITION_BYTES


def test_a_new_prompt_frees_the_one_before(directory, prompts):
    tamis = Tamis(directory)
    tamis.prefill(prompts[0])
    once = tamis.kv_bytes
    tamis.prefill(prompts[1])
    assert tamis.kv_bytes == once


def test_seconds_per_token_add_up(directory, prompts):
    for contestant in (Tamis(directory), Transformers(directory)):
        start = time.perf_counter()
        prefill_s = contestant.prefill(prompts[0])
        per_token_s = contestant.decode(10)
        took = time.perf_counter() - start
        assert 0.5 * took < prefill_s + 10 * per_token_s <= took


def test_requests_at_once_are_answered_and_freed(directory, prompts):
    tamis = Tamis(directory)
    start = time.perf_counter()
    throughput = tamis.answer(prompts, 6)
    took = time.perf_counter() - start
    assert throughput.tokens_per_s >= len(prompts) * 6 / took
    assert throughput.decode_tokens_per_s > 0
    assert 0 < throughput.overhead < 1
    assert tamis.kv_bytes == 0


def test_one_by_one_counts_every_request(directory, prompts):
    start = time.perf_counter()
    throughput = OneByOne(Transformers(directory)).answer(prompts, 6)
    took = time.perf_counter() - start
    assert len(prompts) * 6 / took <= throughput.tokens_per_s
    assert throughput.decode_tokens_per_s > 0
    assert throughput.overhead is None


@pytest.mark.slow
def test_everything_is_measured_in_a_small_run(shape):
    settings = engine.Settings(
        shape=shape,
        contexts=(70, 200),
        once_from=200,
        decode_tokens=2,
        requests=3,
        request_tokens=20,
        new_tokens=6,
        repeat=2,
        threads=1,
    )
    out = io.StringIO()
    measured = engine.measure(settings, Console(file=out))
    rows = {row.name: row for row in engine.rows(settings, measured)}
    assert "one request of 200 tokens" in out.getvalue()
    assert rows["prefill of 70 tokens"].ours.n == 2
    assert rows["prefill of 200 tokens"].theirs.n == 1
    assert rows["decode after 200 tokens"].ours.n == 2
    assert rows["decode after 200 tokens"].met is not None
    assert rows["decode after 70 tokens"].met is None
    assert rows["KV pool beyond the formula"].met is True
    assert rows["3 requests of 20 + 6 tokens"].ratio > 0
    judged = [row for row in rows.values() if row.met is not None]
    assert len(judged) == 4
    compared = [row for row in rows.values() if row.theirs is not None]
    assert len(rows) - len(compared) == 2
    assert all(row.of_limit > 0 for row in compared)


def test_quick_sizes_are_not_judged():
    settings = engine.Settings().quick()
    assert settings.target(0.3) is None
    assert max(settings.contexts) < min(engine.Settings().contexts)
