"""Fixtures: tiny models, documents, and engines that keep them as contexts."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tamis import LLM, SamplingParams
from tamis.model import Model, load_model

PAGE = 4
TEN = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=0)


def words(n: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(n)]


DOCUMENTS = [words(37, 1), words(21, 2), words(50, 3)]
QUESTION = words(9, 4)


@pytest.fixture(scope="session")
def load(tiny_dir: Callable[[str], Path]) -> Callable[..., Model]:
    """`load(name, dtype)` is a tiny model, loaded once."""
    return cache(
        lambda name, dtype="float32": load_model(tiny_dir(name), dtype=dtype, device="cpu")
    )


@pytest.fixture(scope="session")
def llama(load: Callable[..., Model]) -> Model:
    return load("llama")


def make(model: Model, **settings: Any) -> LLM:
    """A new engine."""
    return LLM(model, **({"kv_memory": "16MiB", "page_size": PAGE} | settings))


def add(llm: LLM, documents: list[list[int]] = DOCUMENTS) -> list[str]:
    """Have documents kept as contexts."""
    return [llm.add_context(document) for document in documents]


def logprobs(output: Any) -> list[float]:
    """Of the tokens of an output's first completion."""
    return [token.logprob for token in output.completions[0].logprobs]
