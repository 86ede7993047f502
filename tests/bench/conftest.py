"""Results as a run writes them, made up and real."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tamis import LLM
from tamis.bench.record import Record, Settings
from tamis.bench.results import Answer, Reading, Timing

SETTINGS = Settings(
    model="somewhere/tiny-model",
    parameters=3_800_000,
    dtype="float32",
    device="cpu",
    haystack="",
    samples=10,
    seed=0,
    kinds=("word", "number"),
    phrasings=("restated", "natural"),
    chat=False,
    truncate=False,
    new_tokens=32,
)


def answer(plan: str = "dense", **values: Any) -> Answer:
    """A right answer of 2 MiB; `values` change it."""
    size = 2 * 2**20
    given: dict[str, Any] = {
        "task": "single",
        "length": 1024,
        "sample": 0,
        "question": 0,
        "depth": 0.5,
        "kind": "word",
        "phrasing": "natural",
        "prompt_digest": "0123456789ab",
        "prompt_tokens": 1040,
        "output_tokens": 3,
        "expected": [" apple"],
        "answer": " apple",
        "score": 1.0,
        "exact": True,
        "kv_bytes": size,
        "kv_bytes_peak": size,
        "kv_bytes_dense": size,
    }
    return Answer(plan=plan, **given | values)


def reading(plan: str = "dense", **values: Any) -> Reading:
    """A window of 2 MiB, its second half read with a perplexity of 8; `values` change it."""
    size = 2 * 2**20
    given: dict[str, Any] = {
        "length": 1024,
        "sample": 0,
        "prompt_digest": "0123456789ab",
        "scored_tokens": 512,
        "nats": 512 * math.log(8),
        "perplexity": 8.0,
        "kv_bytes": size,
        "kv_bytes_peak": size,
        "kv_bytes_dense": size,
    }
    return Reading(plan=plan, **given | values)


def timing(plan: str = "dense", **values: Any) -> Timing:
    """A request of 2 MiB, its first token after 1 s, the others 10 ms apart; `values` change it."""
    size = 2 * 2**20
    given: dict[str, Any] = {
        "length": 1024,
        "repeat": 0,
        "output_tokens": 32,
        "ttft_s": 1.0,
        "tpot_s": 0.01,
        "dense_ttft_s": 1.0,
        "dense_tpot_s": 0.01,
        "kv_bytes": size,
        "kv_bytes_peak": size,
        "kv_bytes_dense": size,
        "timeline": [(0.0, 0), (0.5, size // 2), (1.0, size), (1.31, size)],
    }
    return Timing(plan=plan, **given | values)


@pytest.fixture
def record() -> Record:
    return Record(
        SETTINGS,
        {"processor": "Some CPU, 2 cores"},
        {"tamis": "0.1.0", "torch": "2.13.0"},
        "2026-01-02 03:04 UTC",
        "tamis bench --model somewhere/tiny-model",
    )


@pytest.fixture(scope="session")
def llm(tiny_dir: Callable[[str], Path]) -> LLM:
    """A Llama of random weights with a token per byte and a context of 512."""
    return LLM(tiny_dir("llama"), dtype="fp32", kv_memory="16MiB", page_size=16)
