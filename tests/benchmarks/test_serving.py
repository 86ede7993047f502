"""The benchmark of steady answers measures what it says, in miniature."""

from __future__ import annotations

import pytest

import serving
from tamis.engine.pace import Full, Steady
from tamis.model import load_model


@pytest.fixture(scope="module")
def disturbance(directory):
    model = load_model(directory, dtype="float32", device="cpu")
    return serving.Disturbance(model, serving.Setting(2, 16, 120, 5, 64))


def test_a_pace_decides_in_how_many_steps_a_prompt_comes_in(disturbance):
    full, steady = disturbance.run(Full()), disturbance.run(Steady(1.01))
    assert full["steps"] == 2  # 62 of its tokens beside 2 that are generated
    assert steady["steps"] > 4
    for sample in (full, steady):
        assert 0 < sample["median"] <= sample["p95"] <= sample["longest"]
        assert sample["first_s"] > 0
        assert sample["disturbed_ms"] == pytest.approx(sample["median"] * sample["undisturbed_ms"])


def test_rows_say_whether_answers_stay_steady():
    def samples(median):
        names = ("undisturbed_ms", "disturbed_ms", "median", "p95", "longest", "first_s")
        return [dict.fromkeys(names, median + noise) for noise in (-0.1, 0.0, 0.4)]

    for median, met in ((2.4, True), (2.6, False)):
        rows = serving.rows(4, steady=samples(median), full=samples(80))
        [judged] = [row for row in rows if row.target is not None]
        assert (judged.ours.median, judged.theirs.median, judged.met) == (median, 80, met)
