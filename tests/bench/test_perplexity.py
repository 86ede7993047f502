"""Held-out perplexity is the model's own, over windows that are what they claim to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tamis import LLM, Plan
from tamis.bench.perplexity import (
    ReadingWork,
    Window,
    cut_windows,
    open_readings,
    run_readings,
)
from tamis.bench.results import Reading, ResultFile
from tamis.bench.tasks.corpus import haystack_lines
from tamis.errors import ConfigError, KVMemoryError
from tests.tiny_models import BOS

PLANS = {"dense": Plan(), "dense too": Plan()}
TEXT = "".join(haystack_lines()[:200])


@pytest.fixture(scope="module")
def windows(llm: LLM) -> list[Window]:
    return cut_windows(llm, TEXT, [64, 301], 3)


def read(
    llm: LLM, windows: list[Window], path: Path, plans: dict[str, Plan] = PLANS
) -> tuple[int, list[Reading]]:
    """How many windows this run read, and all readings in the file after it."""
    done: list[int] = []
    with ResultFile(path, Reading) as file:
        run_readings(llm, open_readings(windows, plans, file.rows), file, done.append)
        return len(done), file.rows


def test_perplexity_is_that_of_transformers_cross_entropy_on_the_second_half(
    llm: LLM,
    windows: list[Window],
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    count, readings = read(llm, windows, tmp_path / "perplexity.jsonl")

    assert count == len(readings) == 2 * len(windows)
    found = {(r.plan, r.length, r.sample): r for r in readings}
    for window in windows:
        ids = torch.tensor([window.token_ids])
        labels = ids.clone()
        labels[:, : window.length // 2] = -100  # what Transformers leaves out of its loss
        with torch.inference_mode():
            loss = tiny_model("llama")(input_ids=ids, labels=labels).loss
        for plan in PLANS:
            reading = found[plan, window.length, window.sample]
            assert reading.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
            assert reading.scored_tokens == (labels != -100).sum()
            assert reading.nats == pytest.approx(float(loss) * reading.scored_tokens, rel=1e-4)
            assert reading.kv_bytes_peak == reading.kv_bytes_dense > 0


def test_what_a_plan_does_after_the_prompt_shows(
    llm: LLM, windows: list[Window], tmp_path: Path
) -> None:
    texts = ("dense", "snapkv(budget=1.0)", "snapkv(budget=33)", "streamingllm(budget=8)")
    plans = {text: Plan.parse(text) for text in texts}
    _, readings = read(llm, windows[3:4], tmp_path / "p.jsonl", plans)

    found = {reading.plan: reading for reading in readings}
    dense, whole, *changed = (found[text] for text in texts)
    assert whole.nats == pytest.approx(dense.nats, rel=1e-5)
    for reading in changed:
        assert reading.nats != pytest.approx(dense.nats, rel=1e-3)
        assert reading.kv_bytes < dense.kv_bytes


def test_windows_are_exactly_as_long_as_asked_and_begin_as_texts_do(
    llm: LLM, windows: list[Window]
) -> None:
    assert [(w.length, w.sample) for w in windows] == [(n, i) for n in (64, 301) for i in range(3)]
    whole = llm.encode(TEXT)
    for window in windows:
        assert window.token_ids[0] == BOS == whole[0]
        assert bytes(window.token_ids[1:]) in bytes(whole[1:])  # a token is a byte here


@pytest.mark.parametrize("length", [2, 40, 101])
def test_windows_do_not_overlap_and_are_fewer_where_the_text_is_short(
    llm: LLM, length: int
) -> None:
    text = "".join(map(chr, range(32, 127))) + "".join(map(chr, range(1, 6)))  # 100 bytes, all new
    for seed in range(5):
        windows = cut_windows(llm, text, [length], 60, seed)
        assert [window.length for window in windows] == [length] * min(60, 100 // (length - 1))
        read = [token for window in windows for token in window.token_ids[1:]]
        assert len(read) == len(set(read))


def test_the_seed_decides_where_windows_lie(llm: LLM, windows: list[Window]) -> None:
    assert cut_windows(llm, TEXT, [301, 64, 64], 3) == windows
    assert cut_windows(llm, TEXT, [64], 3) == windows[:3]
    assert cut_windows(llm, TEXT, [64], 3, seed=1) != windows[:3]


@pytest.mark.parametrize("length", [1, 513])
def test_lengths_without_a_half_to_score_or_beyond_the_context_are_refused(
    llm: LLM, length: int
) -> None:
    with pytest.raises(ConfigError, match=rf"from 2 to 512 tokens .* not {length}$"):
        cut_windows(llm, TEXT, [64, length], 1)


def test_a_text_shorter_than_a_window_is_refused_and_not_repeated(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="at length 64 needs a longer haystack than 62 tokens"):
        cut_windows(llm, "x" * 62, [64], 1)


def test_too_little_kv_memory_is_found_out_before_anything_runs(
    llm: LLM, windows: list[Window]
) -> None:
    small = LLM(llm.model, kv_memory=64 * 2**10, page_size=16)
    with pytest.raises(KVMemoryError, match="would do"):
        open_readings(windows, PLANS, ()).check(small)
    open_readings((), PLANS, ()).check(small)
    open_readings(windows, PLANS, ()).check(llm)
    assert llm.engine.idle


def test_a_killed_run_goes_on_with_what_is_missing_and_ends_the_same(
    llm: LLM, windows: list[Window], tmp_path: Path
) -> None:
    path = tmp_path / "perplexity.jsonl"
    _, whole = read(llm, windows, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:60])

    count, resumed = read(llm, windows, path)

    assert count == len(whole) - 5
    assert [r.key for r in resumed[:5]] == [r.key for r in whole[:5]]
    perplexities = {r.key: r.perplexity for r in whole}
    assert {r.key: r.perplexity for r in resumed} == pytest.approx(perplexities, rel=1e-5)
    assert read(llm, windows, path)[0] == 0


def test_an_interrupted_run_frees_all_pages(
    llm: LLM, windows: list[Window], tmp_path: Path
) -> None:
    def interrupt(tokens: int) -> None:
        raise KeyboardInterrupt

    with ResultFile(tmp_path / "perplexity.jsonl", Reading) as file:
        with pytest.raises(KeyboardInterrupt):
            run_readings(llm, open_readings(windows, PLANS, ()), file, interrupt)
        assert len(file.rows) == 1
    assert llm.engine.idle
    assert llm.engine.cache.bytes_in_use == 0


def test_what_failed_and_what_is_another_text_now_is_read_again(
    llm: LLM, windows: list[Window], tmp_path: Path
) -> None:
    _, readings = read(llm, windows, tmp_path / "perplexity.jsonl")
    failed = replace(readings[0], nats=None, perplexity=None, error="no memory")

    def left(windows: list[Window], readings: list[Reading]) -> ReadingWork:
        return open_readings(windows, PLANS, readings)

    assert left(windows, readings).tokens == 0
    assert list(left(windows, [failed, *readings[1:]])) == [("dense", windows[0])]
    changed = [replace(windows[0], token_ids=(BOS, *b"x" * 63)), *windows[1:]]
    assert left(changed, readings).tokens == 2 * 64


def test_a_failing_request_is_recorded_without_a_perplexity(
    llm: LLM, windows: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("the forward broke")

    monkeypatch.setattr(llm.model, "forward", fail)
    _, (reading,) = read(llm, windows[:1], tmp_path / "p.jsonl", {"dense": Plan()})
    assert (reading.nats, reading.perplexity) == (None, None)
    assert reading.error == "RuntimeError: the forward broke"
