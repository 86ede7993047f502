"""Means, spreads, fronts and depths, against cases worked by hand."""

from __future__ import annotations

import math

import pytest

from tamis.bench.summary import Quality, Spread, Summary, pareto_front, quality, spread
from tests.bench.conftest import answer, reading, timing


def test_a_mean_leaves_failed_requests_out_and_counts_them() -> None:
    rows = [
        answer(score=1.0, exact=True),
        answer(score=0.5, exact=False),
        answer(score=None, exact=None, error="no memory"),
    ]
    assert quality(rows) == Quality(score=0.75, exact=0.5, count=2, failed=1)
    assert quality([]) == Quality(None, None, 0, 0)


def test_every_task_counts_the_same_however_many_answers_it_has() -> None:
    rows = [answer(task="single", sample=i, score=1.0) for i in range(3)]
    rows += [answer(task="frequent", score=0.0)]
    summary = Summary(rows, [])
    assert summary.overall("dense", 1024) == 0.5
    assert summary.overall("dense", 2048) is None
    assert summary.tasks == ["single", "frequent"]


def test_the_last_answer_to_an_exercise_counts() -> None:
    failed = answer(score=None, exact=None, error="no memory")
    summary = Summary([failed, answer(score=1.0)], [])
    assert summary.cell("dense", "single", 1024) == Quality(1.0, 1.0, 1, 0)
    assert summary.failed == 0


def test_plans_come_in_the_order_asked_for_and_published_lengths_last() -> None:
    rows = [answer("b", length=None, task="ruler/vt"), answer("a", length=4096), answer("c")]
    summary = Summary(rows, [timing("d")], first=["x", "c", "a"])
    assert summary.plans == ["c", "a", "b", "d"]
    assert summary.lengths == [1024, 4096, None]
    assert summary.tasks == ["single", "ruler/vt"]


def test_memory_is_the_mean_over_requests_and_its_share_of_exact_attention() -> None:
    rows = [
        answer(sample=0, kv_bytes_peak=100, kv_bytes=50, kv_bytes_dense=400),
        answer(sample=1, kv_bytes_peak=300, kv_bytes=150, kv_bytes_dense=400),
        answer(sample=2, kv_bytes_peak=999, error="died", score=None, exact=None),
    ]
    memory = Summary(rows, []).memory("dense", 1024)
    assert memory is not None
    assert (memory.peak, memory.end, memory.dense, memory.share) == (200, 100, 400, 0.5)


def test_perplexity_counts_every_scored_token_the_same() -> None:
    rows = [
        reading(sample=0, scored_tokens=300, nats=300 * math.log(2), kv_bytes_peak=100),
        reading(sample=1, scored_tokens=100, nats=100 * math.log(32), kv_bytes_peak=300),
        reading(sample=2, nats=None, perplexity=None, error="no memory", kv_bytes_peak=999),
        reading("other"),
    ]
    found = Summary([], [], rows).perplexity("dense", 1024)
    assert found is not None
    assert found.value == pytest.approx(4)  # 2^((300 * 1 + 100 * 5) / 400)
    assert (found.tokens, found.windows, found.failed) == (400, 2, 1)
    assert found.memory is not None
    assert found.memory.peak == 200
    assert Summary([], [], rows).perplexity("dense", 2048) is None


def test_perplexity_alone_failed_or_repeated() -> None:
    failed = reading(nats=None, perplexity=None, error="no memory")
    summary = Summary([], [], [failed])
    found = summary.perplexity("dense", 1024)
    assert found is not None
    assert (found.value, found.tokens, found.failed, found.memory) == (None, 0, 1, None)
    assert (summary.failed, summary.plans, summary.read_lengths) == (1, ["dense"], [1024])
    repeated = Summary([], [], [failed, reading()])
    assert repeated.failed == 0


def test_perplexity_is_in_no_mean_and_in_no_mean_of_memory() -> None:
    rows = [answer(score=0.5, kv_bytes_peak=100)]
    summary = Summary(rows, [], [reading(), reading(length=4096)])
    assert summary.overall("dense", 1024) == 0.5
    assert (summary.tasks, summary.lengths) == (["single"], [1024])
    memory = summary.memory("dense", 1024)
    assert memory is not None
    assert memory.peak == 100


def test_ratios_compare_within_each_round() -> None:
    rows = [
        timing("p", repeat=0, ttft_s=1.0, dense_ttft_s=2.0),
        timing("p", repeat=1, ttft_s=6.0, dense_ttft_s=4.0),
        timing("p", repeat=2, ttft_s=3.0, dense_ttft_s=4.0),
    ]
    speed = Summary([], rows).speed("p", 1024)
    assert speed is not None
    assert speed.ttft_s == Spread(median=3.0, low=1.0, high=6.0)
    assert speed.ttft_ratio == Spread(median=0.75, low=0.5, high=1.5)
    assert speed.rounds == 3


def test_the_timeline_shown_is_that_of_the_median_round() -> None:
    rows = [timing(repeat=i, ttft_s=t) for i, t in enumerate([5.0, 1.0, 3.0])]
    shown = Summary([], rows).timeline("dense", 1024)
    assert shown is not None
    assert shown.ttft_s == 3.0


def test_a_spread_is_median_and_range() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.0, 4.0)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.9), (2.0, 0.8), (3.0, 0.9), (4.0, 1.0), (0.5, 0.1)]
    assert pareto_front(points) == [True, True, False, False, True, True]


def test_equal_points_are_both_on_the_front_and_one_point_always_is() -> None:
    assert pareto_front([(1.0, 0.5), (1.0, 0.5)]) == [True, True]
    assert pareto_front([(1.0, 0.0)]) == [True]
    assert pareto_front([]) == []


def test_depths_fall_into_equal_parts_and_only_tasks_of_one_fact_count() -> None:
    rows = [
        answer(sample=0, depth=0.0, score=1.0),
        answer(sample=1, depth=0.19, score=0.0),
        answer(sample=2, depth=0.2, score=1.0),
        answer(sample=3, depth=1.0, score=1.0),
        answer(sample=4, depth=0.5, task="frequent"),
    ]
    found = Summary(rows, []).by_depth("dense", 5)
    assert {place: cell.score for place, cell in found.items()} == {
        (1024, 0): 0.5,
        (1024, 1): 1.0,
        (1024, 4): 1.0,
    }


def test_kinds_and_phrasings_are_told_apart() -> None:
    rows = [
        answer(sample=0, kind="word", phrasing="natural", score=1.0),
        answer(sample=1, kind="number", phrasing="natural", score=0.0),
        answer(sample=2, kind=None, phrasing=None),
    ]
    found = Summary(rows, []).by_style("dense")
    assert {style: cell.score for style, cell in found.items()} == {
        ("word", "natural"): 1.0,
        ("number", "natural"): 0.0,
    }
