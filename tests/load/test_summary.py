"""What a run says: rates, percentiles, and who met the objectives."""

from __future__ import annotations

import pytest

from tamis.load.client import Outcome
from tamis.load.run import Progress
from tamis.load.summary import Objectives, Percentiles, Summary

LIMITS = Objectives(ttft_s=1.0, tpot_s=0.1)


def answered(ttft_s: float, tpot_s: float | None) -> Outcome:
    n_tokens = 1 if tpot_s is None else 11
    return Outcome(0, 100, n_tokens, ttft_s, tpot_s, tpot_s, ttft_s + 10 * (tpot_s or 0))


def test_goodput_counts_those_who_met_both_objectives() -> None:
    outcomes = [
        answered(1.0, 0.1),
        answered(1.1, 0.05),
        answered(0.5, 0.11),
        answered(0.2, None),
        Outcome(0, ttft_s=0.1, error="HTTP 500"),
        Outcome(0, error="HTTP 429"),
        Outcome(0, error="HTTP 429"),
    ]
    summary = Summary.of(Progress(9, 2, 4.0, outcomes), LIMITS)
    assert (summary.good, summary.goodput) == (2, 0.5)
    assert (summary.answered, summary.failed, summary.unfinished) == (4, 3, 2)
    assert summary.errors == {"HTTP 429": 2, "HTTP 500": 1}
    assert summary.requests_s == 1.0
    assert summary.output_tokens_s == 34 / 4
    assert summary.prompt_tokens == 100
    assert summary.ttft is not None
    assert summary.tpot is not None
    assert summary.ttft.most == 1.1
    assert summary.tpot.p50 == pytest.approx(0.1)


def test_nothing_answered_is_a_summary_too() -> None:
    summary = Summary.of(Progress(1, 1, 0.0, []), LIMITS)
    assert (summary.goodput, summary.ttft) == (0, None)


def test_percentiles() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([2.0]) == Percentiles(2, 2, 2, 2, 2, 2)
    of_all = Percentiles.of([float(i) for i in range(101)])
    assert of_all == Percentiles(50, 50, 90, 95, 99, 100)
