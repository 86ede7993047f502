"""Timings are of one request at a time, against exact attention in the same round."""

from __future__ import annotations

from pathlib import Path

import pytest

from tamis import LLM, Plan
from tamis.bench.results import ResultFile, Timing
from tamis.bench.speed import SpeedWork, run_timings
from tamis.errors import ConfigError, RequestError

TEXT = "The sieve keeps what matters, and lets the rest go.\n" * 400


def work(
    plans: tuple[str, ...] = ("dense",),
    lengths: tuple[int, ...] = (64, 200),
    repeat: int = 2,
    new_tokens: int = 4,
    done: frozenset[tuple[object, ...]] = frozenset(),
) -> SpeedWork:
    return SpeedWork(dict.fromkeys(plans, Plan()), lengths, repeat, new_tokens, TEXT, done)


def run(llm: LLM, todo: SpeedWork, path: Path) -> list[Timing]:
    with ResultFile(path, Timing) as file:
        run_timings(llm, todo, file, lambda tokens: None)
        return file.rows


def test_every_plan_is_timed_in_every_round(llm: LLM, tmp_path: Path) -> None:
    rows = run(llm, work(("dense", "other")), tmp_path / "timings.jsonl")

    assert [row.key for row in rows] == [
        (plan, length, repeat)
        for length in (64, 200)
        for repeat in (0, 1)
        for plan in ("dense", "other")
    ]
    for dense, other in zip(rows[::2], rows[1::2], strict=True):
        assert other.dense_ttft_s == dense.dense_ttft_s == dense.ttft_s
        assert other.dense_tpot_s == dense.dense_tpot_s == dense.tpot_s
        assert other.ttft_s != dense.ttft_s
        assert dense.output_tokens == other.output_tokens == 4


def test_memory_over_time_rises_step_by_step_to_what_the_request_took(
    llm: LLM, tmp_path: Path
) -> None:
    small_steps = LLM(llm.model, kv_memory="16MiB", page_size=16, max_batch_tokens=50)
    (row,) = run(small_steps, work(lengths=(200,), repeat=1), tmp_path / "timings.jsonl")
    moments, sizes = zip(*row.timeline, strict=True)

    assert len(sizes) == 1 + 4 + 3  # the start, four chunks, three tokens after the first
    assert sizes[0] == 0
    for chunk in range(1, 5):
        assert sizes[chunk] == small_steps.engine.layout.bytes_for(50 * chunk)
    assert sizes[-1] == row.kv_bytes == row.kv_bytes_peak == max(sizes)
    assert list(moments) == sorted(moments)
    assert moments[4] == pytest.approx(row.ttft_s, abs=0.02)
    assert small_steps.engine.cache.bytes_in_use == 0


def test_what_was_timed_is_not_timed_again_and_a_new_plan_gets_its_own_baseline(
    llm: LLM, tmp_path: Path
) -> None:
    path = tmp_path / "timings.jsonl"
    rows = run(llm, work(lengths=(64,), repeat=1), path)
    done = frozenset(row.key for row in rows)
    again = work(("dense", "other"), lengths=(64,), repeat=1, done=done)

    assert again.rounds == [(64, 0, ["other"])]
    assert again.tokens == 2 * 64  # exact attention is timed beside it
    rows = run(llm, again, path)
    assert [row.plan for row in rows] == ["dense", "other"]
    assert rows[1].dense_ttft_s != rows[0].dense_ttft_s


def test_a_plan_without_dense_beside_it_is_compared_all_the_same(llm: LLM, tmp_path: Path) -> None:
    (row,) = run(llm, work(("other",), lengths=(64,), repeat=1), tmp_path / "timings.jsonl")
    assert row.plan == "other"
    assert row.dense_ttft_s > 0


def test_lengths_beyond_the_context_are_refused(llm: LLM) -> None:
    work(lengths=(508,)).check(llm)
    with pytest.raises(ConfigError, match="context of 512"):
        work(lengths=(509,)).check(llm)


def test_a_request_that_fails_ends_the_timing_and_frees_its_pages(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("the forward broke")

    monkeypatch.setattr(llm.model, "forward", fail)
    with pytest.raises(RequestError, match="the forward broke"):
        run(llm, work(), tmp_path / "timings.jsonl")
    assert llm.engine.cache.bytes_in_use == 0
