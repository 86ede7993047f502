"""A cache that must fail does fail: the last tenth of a document does not answer about its first
half. Were it to, the tasks would not measure what a cache keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tamis import LLM, SamplingParams, shipped
from tamis.bench.exercise import Exercise, exercises_of
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.cache import SequenceCache

LENGTH = 2048
KEPT = LENGTH // 10


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The reference model, whose steps take exactly a document."""
    folder = shipped.find()
    if folder is None:
        pytest.skip("needs the reference model in models/; `tamis train reference` makes it")
    return LLM(folder, dtype="float32", kv_memory="64MiB", max_batch_tokens=LENGTH)


@pytest.fixture(scope="module")
def exercises(llm: LLM) -> list[Exercise]:
    """One needle per document, in the first at its start, in the last at its end."""
    return list(exercises_of(make_samples(Suite("single", LENGTH, 80, seed=7), llm)))


@pytest.fixture(scope="module")
def far(exercises: list[Exercise]) -> list[Exercise]:
    """Twenty whose needle lies in the first half."""
    return [exercise for exercise in exercises if (exercise.depth or 0) < 0.5][::2]


@pytest.fixture(scope="module")
def near(exercises: list[Exercise]) -> list[Exercise]:
    """Those whose needle lies in the last tenth, whole."""
    return [exercise for exercise in exercises if (exercise.depth or 0) > 0.92]


def keep_last(cache: SequenceCache, n: int) -> None:
    """Keep the last `n` tokens of every head."""
    for layer in range(len(cache.layout.layers)):
        lengths = cache.lengths[cache.layout.rows(layer)]
        cache.keep(layer, [np.arange(length - n, length, dtype=np.int32) for length in lengths])


def exact_match(llm: LLM, exercises: Sequence[Exercise], *, kept: int = LENGTH) -> float:
    """The share answered exactly, when only the last `kept` tokens of the document are in the cache
    as the question comes."""
    return float(np.mean([e.is_exact(_answer(llm, e, kept)) for e in exercises]))


def _answer(llm: LLM, exercise: Exercise, kept: int) -> str:
    engine = llm.engine
    engine.add_request(llm.encode(exercise.text), SamplingParams(max_tokens=24, stop="\n"))
    engine.step()
    (sequence,) = engine.scheduler.running
    assert sequence.cache is not None
    assert sequence.n_computed == LENGTH  # the document, and nothing of the question
    assert engine.cache.bytes_in_use == engine.layout.bytes_for(LENGTH)
    keep_last(sequence.cache, kept)
    assert engine.cache.bytes_in_use == engine.layout.bytes_for(kept)
    while True:
        for increment in engine.step():
            if increment.output is not None:
                return increment.output.text


def test_exact_attention_finds_needles_in_the_first_half(llm: LLM, far: list[Exercise]) -> None:
    assert exact_match(llm, far) >= 0.9


def test_the_last_tenth_does_not_find_them(llm: LLM, far: list[Exercise]) -> None:
    assert llm.engine.layout.bytes_for(KEPT) <= llm.engine.layout.bytes_for(LENGTH) / 8
    assert exact_match(llm, far, kept=KEPT) <= 0.1


def test_the_last_tenth_finds_the_needles_that_lie_in_it(llm: LLM, near: list[Exercise]) -> None:
    """So what the far ones lack is their facts, and not a model that is well."""
    assert exact_match(llm, near, kept=KEPT) >= 0.75
