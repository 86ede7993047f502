"""The benchmark of preemption measures what it says, in miniature."""

from __future__ import annotations

import pytest

import preemption
from tamis.model import load_model


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def samples(model):
    turns = preemption.Turns(model, preemption.Setting(3, 1, 160, 32, 4, page=16))
    return {kind: [turns.run(kind)] for kind in preemption.KINDS}


def test_every_kind_takes_turns(samples):
    for [sample] in samples.values():
        assert sample["preemptions"] > 6
        assert 0 < sample["median_ms"] <= sample["p99_ms"]
        assert sample["tokens_s"] > 0


def test_copies_that_are_kept_spare_copying(samples):
    kept, all_copied, recompute = (sample["copied_mb"] for [sample] in samples.values())
    assert 0 == recompute < kept < all_copied / 2


def test_rows_compare_with_recomputation(samples):
    first = preemption.rows(samples)[0]
    assert (first.name, first.unit) == ("swap, copies kept: throughput", "tokens/s")
    assert first.theirs.median == samples["recompute"][0]["tokens_s"]
    assert len(preemption.rows(samples)) == 10


def test_single_swaps_are_measured_beside_a_plain_copy(model):
    out, back, again = preemption.swap_rows(model, 64, repeats=2, page=16)
    assert [row.name.split(": ")[1] for row in (out, back, again)] == [
        "out, all of it",
        "in",
        "out again after 16 tokens",
    ]
    assert all(row.ours.low > 0 and row.theirs.low > 0 for row in (out, back, again))
