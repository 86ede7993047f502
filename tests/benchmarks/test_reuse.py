"""The benchmark of reused chunks measures what it says, in miniature."""

from __future__ import annotations

import pytest

import reuse
from tamis import LLM
from tamis.bench.exercise import exercises_of
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.model import load_model
from tamis.shipped import find


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, dtype="float32", device="cpu")


def test_every_plan_is_timed_against_the_whole_prompt(model):
    rows = reuse.time_rows(model, chunks=3, tokens=70, question=5, rounds=2)
    assert [row.name.split(":")[0] for row in rows] == list(reuse.PLANS)
    for row in rows:
        assert row.ours.n == row.theirs.n == 2
        assert 0 < row.ours.low <= row.ours.median
        assert row.theirs == rows[0].theirs


def test_chunks_are_the_document_cut_between_lines():
    document = "".join(f"line {i} {'x' * (7 * i % 13)}\n" for i in range(40))
    parts = reuse.chunks_of(document, 4)
    assert "".join(parts) == document
    assert len(parts) == 4
    assert all(part.endswith("\n") for part in parts)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) < 60


@pytest.mark.skipif(find() is None, reason="the reference model is not part of this copy")
def test_exact_attention_answers_and_leaves_no_context_behind():
    model = load_model(find(), dtype="float32", device="cpu")
    samples = make_samples(Suite("single", 400, 1), model.tokenizer)
    llm = LLM(model, kv_memory="64MiB")
    found = dict(reuse.scores(llm, list(exercises_of(samples)), 3))
    assert list(found) == [reuse.DENSE, *reuse.PLANS]
    assert found[reuse.DENSE] == 1
    texts = reuse.plain_texts(llm, 90, 2)
    assert [len(text) for text in texts] == [90, 90]
    [[plan, share], *others] = reuse.agreements(llm, texts[:1], 1, 10)
    assert (plan, share) == ("promptcache()", 1)  # one context is exact
    assert len(others) == len(reuse.PLANS) - 1
    assert llm.engine.cache.bytes_in_use == 0
