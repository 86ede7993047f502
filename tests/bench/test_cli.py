"""`tamis bench` from the command line to the report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tamis.cli.app import Commands
from tamis.cli.bench import bench
from tests.cli.conftest import error_of

Bench = Callable[..., Result]
SMALL = ("--tasks", "single,key_value", "--lengths", "128,200", "--samples", "2", "--repeat", "2")
SETTINGS = ("--dtype", "fp32", "--kv-memory", "16MiB")


@pytest.fixture(scope="module")
def model(tiny_dir: Callable[[str], Path]) -> Path:
    return tiny_dir("llama")


@pytest.fixture
def tamis_bench(model: Path, tmp_path: Path) -> Bench:
    """`tamis_bench("--tasks", ...)` is the result of that command, its --out `tmp_path / "out"`."""
    app = typer.Typer(cls=Commands)
    app.command()(bench)
    app.callback()(lambda: None)
    base = ("bench", "--model", model, *SETTINGS, "--out", tmp_path / "out")

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in (*base, *arguments)])

    return invoke


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_leaves_answers_timings_a_table_and_a_report(
    tamis_bench: Bench, tmp_path: Path
) -> None:
    result = tamis_bench(*SMALL, "--plans", "dense")

    assert result.exit_code == 0, result.output
    answers = lines(tmp_path / "out" / "answers.jsonl")
    assert len(answers) == 2 * 2 * 2
    assert {(a["task"], a["length"]) for a in answers} == {
        (task, length) for task in ("single", "key_value") for length in (128, 200)
    }
    timings = lines(tmp_path / "out" / "timings.jsonl")
    assert [(t["length"], t["repeat"]) for t in timings] == [(128, 0), (128, 1), (200, 0), (200, 1)]
    for word in ("dense", "single", "key_value", "first token", "each token", "KV peak, MiB"):
        assert word in result.stdout
    assert "perplexity" not in result.stdout
    assert result.stderr.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "KV memory over time" in html
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["samples"] == 2


def test_results_with_quantized_weights_are_no_others(tamis_bench: Bench, tmp_path: Path) -> None:
    less = ("--tasks", "single", "--lengths", "128", "--samples", "1", "--repeat", "1")
    assert tamis_bench(*less, "--weights", "int8").exit_code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["dtype"] == "float32 with int8 weights"
    assert "were made with dtype 'float32 with int8 weights'" in error_of(tamis_bench(*less))


def test_the_same_command_goes_on_and_a_longer_one_adds(tamis_bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "out" / "answers.jsonl"
    assert tamis_bench(*SMALL, "--no-speed").exit_code == 0
    whole = lines(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])

    result = tamis_bench(*SMALL, "--no-speed")

    assert "going on with 7 answers in" in result.stderr
    assert sorted(map(str, lines(path))) == sorted(map(str, whole))
    more = tamis_bench(*SMALL, "--no-speed", "--lengths", "128,200,300")
    assert more.exit_code == 0, more.output
    assert lines(path)[: len(whole)] == lines(path)[:-4]
    assert {line["length"] for line in lines(path)[-4:]} == {300}
    assert not (tmp_path / "out" / "timings.jsonl").read_bytes()


def test_perplexity_is_a_task_with_results_of_its_own(tamis_bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "out" / "perplexity.jsonl"
    command = ("--tasks", "single,perplexity", "--lengths", "128,200", "--samples", "2")
    result = tamis_bench(*command, "--no-speed")

    assert result.exit_code == 0, result.output
    read = lines(path)
    assert sorted((r["length"], r["sample"], r["scored_tokens"]) for r in read) == [
        (length, sample, length // 2) for length in (128, 200) for sample in (0, 1)
    ]
    assert {a["task"] for a in lines(tmp_path / "out" / "answers.jsonl")} == {"single"}
    assert "perplexity of held-out text" in result.stdout
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Perplexity of held-out text</h2>" in html
    again = tamis_bench(*command, "--no-speed")
    assert "going on with 4 answers, 4 windows read in" in again.stderr
    assert lines(path) == read


def test_other_settings_want_another_folder(tamis_bench: Bench) -> None:
    assert tamis_bench(*SMALL, "--no-speed").exit_code == 0
    message = error_of(tamis_bench(*SMALL, "--no-speed", "--seed", 1))
    assert "were made with seed 0, not 1; give another --out" in message


def test_published_files_are_run_alone_unless_tasks_are_named(
    tamis_bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "vt.jsonl"
    path.write_text(json.dumps({"input": "A = 5. What is A?", "outputs": ["5"]}) + "\n")
    result = tamis_bench("--ruler", path, "--no-speed")
    assert result.exit_code == 0, result.output
    (answer,) = lines(tmp_path / "out" / "answers.jsonl")
    assert (answer["task"], answer["length"], answer["depth"]) == ("ruler/vt", None, None)
    assert "as published" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "singel"), "--tasks has 'singel'; it takes one or more of single, multi_key"),
        (("--lengths", "1x"), "'1x' is no length in tokens"),
        (("--lengths", "505", "--tasks", "single"), "the model's context is 512"),
        (("--lengths", "500", "--tasks", ""), "the model's context of 512"),
        (("--lengths", "513", "--tasks", "perplexity"), "lengths from 2 to 512 tokens"),
        (("--plans", "dense; snapkvv"), "snapkvv"),
        (("--kinds", "colour"), "--kinds has 'colour'"),
        (("--haystack", "/nonexistent/text"), "cannot read the haystack /nonexistent/text"),
        (("--report", "/dev/null/report.html"), "cannot write the report to /dev/null/report.html"),
        (("--out", "/dev/null/out"), "cannot write the report to /dev/null/out/report.html"),
        (("--longbench", "/nonexistent/x.jsonl"), "cannot read the LongBench file"),
    ],
)
def test_errors_are_one_line_that_says_what_to_change(
    tamis_bench: Bench, arguments: tuple[str, ...], message: str
) -> None:
    assert message in error_of(tamis_bench(*arguments))


def test_a_longbench_line_without_its_answers_is_named(tamis_bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"input": "Q", "context": "C", "dataset": "trec"}) + "\n")
    assert f"{path}, line 1: the field" in error_of(tamis_bench("--longbench", path))


def test_without_the_report_libraries_it_says_what_to_install(
    tamis_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name)
    )
    message = error_of(tamis_bench(*SMALL))
    assert message.startswith("the report needs plotly; ")
    assert "pip install 'tamis[bench]'" in message


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(
    tamis_bench: Bench, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    path = out / "answers.jsonl"
    program = (
        "import typer\nfrom tamis.cli.app import Commands\nfrom tamis.cli.bench import bench\n"
        "app = typer.Typer(cls=Commands)\napp.command()(bench)\napp.callback()(lambda: None)\napp()"
    )
    many = ("--tasks", "single", "--lengths", "400", "--samples", "150", "--no-speed")
    process = subprocess.Popen(
        [sys.executable, "-c", program, "bench", "--model", model, *SETTINGS, *many, "--out", out],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not path.exists() or not path.read_bytes():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    kept = len(lines(path))
    assert 0 < kept < 150
    assert f"{kept} answers in {out}; the same command goes on with what is left" in said

    resumed = tamis_bench(*many)
    assert f"going on with {kept} answers" in resumed.stderr
    assert len(lines(path)) == 150
