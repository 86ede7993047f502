"""`tamis demo` asks for hidden facts, measures both engines, and checks their tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import Result

from tamis import LLM
from tamis.bench.exercise import Exercise
from tamis.bench.results import Answer, Timing
from tamis.bench.summary import Summary
from tamis.bench.text import ratio
from tamis.cli import demo_facts, workload
from tamis.cli.peer import TransformersPeer
from tests.cli.conftest import error_of

Tamis = Callable[..., Result]


def test_it_needs_no_model_and_says_that_the_text_is_noise(
    tamis: Tamis, nothing_ships: None, tmp_path: Path
) -> None:
    report = tmp_path / "demo.html"

    result = tamis("demo", "--tokens", 512, "--report", report)

    assert result.exit_code == 0, result.output
    assert "No model ships" in result.stdout
    assert "random weights" in result.stdout
    assert "its text is noise" in result.stdout
    assert "questions" not in result.stdout
    assert not report.exists()
    assert "identical: 32/32 tokens" in result.stdout
    for row in ("prefill of 512 tokens", "decode after it", "8 requests", "KV cache"):
        assert row in result.stdout


def test_by_default_it_asks_the_model_that_ships_under_every_plan(
    tamis: Tamis, ships: Callable[[Path], Path], endless: Path, tmp_path: Path
) -> None:
    ships(endless)
    report = tmp_path / "new" / "demo.html"

    result = tamis("demo", "--tokens", 512, "--report", report)

    assert result.exit_code == 0, result.output
    assert "model: reference" in result.stderr
    assert "18 questions on facts hidden in 512 tokens of Python's own library" in result.stdout
    assert "all 18 questions" in result.stdout
    for plan in demo_facts.PLANS:
        assert plan.split("(")[0] in result.stdout  # a long plan is folded
        assert plan in report.read_text()
    assert "identical: 32/32 tokens" in result.stdout
    assert f"report: {report}\n" in result.stdout


def test_it_runs_the_users_model_on_the_users_text(
    tamis: Tamis, endless: Path, tmp_path: Path
) -> None:
    file, report = tmp_path / "own.txt", tmp_path / "demo.html"
    file.write_text("def sieve(tokens): return [token for token in tokens if token]\n" * 60)

    result = tamis("demo", "--model", endless, "--document", file, "--report", report)

    assert result.exit_code == 0, result.output
    assert "random weights" not in result.stdout
    length = len(LLM(endless, kv_memory="16MiB").encode(file.read_text()))
    assert f"facts hidden in {length:,} tokens of own.txt" in result.stdout
    assert f"prefill of {length:,} tokens" in result.stdout
    assert "identical: 32/32 tokens" in result.stdout
    assert str(file) in report.read_text()


def test_without_the_libraries_for_a_report_the_rest_runs(
    tamis: Tamis, endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name)
    )
    report = tmp_path / "demo.html"

    result = tamis("demo", "--model", endless, "--tokens", 512, "--report", report)

    assert result.exit_code == 0, result.output
    assert "all 18 questions" in result.stdout
    assert "the report needs plotly" in result.stderr
    assert "report:" not in result.stdout
    assert not report.exists()


def test_facts_lie_in_the_document_and_are_asked_of_it(endless: Path, tmp_path: Path) -> None:
    llm = LLM(endless, kv_memory="16MiB")
    file = tmp_path / "own.txt"
    file.write_text("for token in prompt: yield token\n" * 9)

    exercises = demo_facts.hide(llm, file, 600, tmp_path)

    assert {exercise.task for exercise in exercises} == set(demo_facts.TASKS)
    for exercise in exercises:
        document = exercise.text[: exercise.text.rindex("Q: ")]
        assert len(llm.encode(document)) == exercise.length == 600
        assert exercise.expected[0].split()[-1] in document
    assert "yield token" in exercises[0].text


def test_its_tables_say_what_was_answered_rightly() -> None:
    asked = [("walnut", " walnut", True), ("road", " [red]moon", False), ("ghost", "", None)]
    exercises, answers = [], []
    for i, (expected, said, exact) in enumerate(asked):
        text = f"x = 1\nQ: What is key {expected}-key? A:"
        place = {"task": demo_facts.CONVERSATION, "length": 600, "sample": 0, "question": i}
        exercises.append(
            Exercise(**place, text=text, expected=(f" {expected}",), score=float, depth=0.25)
        )
        answers.append(
            Answer(
                plan="dense",
                **place,
                depth=0.25,
                kind="word",
                phrasing="natural",
                prompt_digest="",
                prompt_tokens=600,
                output_tokens=2,
                expected=[f" {expected}"],
                answer=said,
                score=None if exact is None else float(exact),
                exact=exact,
                kv_bytes=3 << 20,
                kv_bytes_peak=3 << 20,
                kv_bytes_dense=4 << 20,
                error="it failed" if exact is None else None,
            )
        )
    timing = Timing("dense", 600, 0, 2, 0.25, 0.005, 0.5, 0.005, 3 << 20, 3 << 20, 4 << 20, [])
    console = Console(record=True, width=120, file=StringIO())

    demo_facts.show(console, exercises, Summary(answers, [timing]))

    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.export_text().splitlines()
        if line.startswith("│")
    ]
    assert rows == [
        ["25 %", "Q: What is key walnut-key? A:", "walnut", "right"],
        ["25 %", "Q: What is key road-key? A:", "[red]moon", "wrong: it is road"],
        ["25 %", "Q: What is key ghost-key? A:", "it failed", "wrong: it is ghost"],
        ["dense", "1 of 3", "3 MiB", ratio(0.75), "250 ms", "5.00 ms"],
    ]


def test_prompts_are_cut_from_the_text(endless: Path) -> None:
    llm = LLM(endless, kv_memory="16MiB")
    text = "for token in prompt: yield token\n" * 200

    work = workload.prepare(llm, text, 520)

    assert work.long == llm.encode(text)[:520]
    assert [len(prompt) for prompt in work.concurrent] == [65] * 8
    assert [token for prompt in work.concurrent for token in prompt] == work.long


def test_the_peer_generates_so_many_tokens_and_reports_its_cache(endless: Path) -> None:
    generation = TransformersPeer(endless, torch.float32).generate(range(20), 5)

    assert len(generation.token_ids) == 5
    assert generation.ttft_s > 0
    assert generation.tpot_s > 0
    # 6 layers, 2 KV heads, 64 elements of a key and of a value, 4 bytes; the last is not cached
    assert generation.kv_bytes == 24 * 6 * 2 * (64 + 64) * 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--tokens", "10"), "--tokens is 10; the least is 512"),
        (("--tokens", "10000000"), "fewer than 10,000,000; give a longer one, or --tokens"),
        (("--tokens", "32768"), "room for 32,736 prompt tokens, not 32,768; give --tokens 32736"),
        (("--document", "no/such/file"), "cannot read no/such/file"),
        (("--document", __file__, "--tokens", "100000"), "give a longer one, or --tokens"),
        (("--report", "/dev/null/demo.html"), "cannot write the report to /dev/null/demo.html"),
        (("--plan", "nonsense"), "unknown method 'nonsense'"),
    ],
)
def test_prompts_that_cannot_be_made_are_explained(
    tamis: Tamis, endless: Path, options: tuple[str, ...], sentence: str
) -> None:
    assert sentence in error_of(tamis("demo", "--model", endless, *options))
