"""`tamis inspect` writes the page, prints a summary, and explains its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.cli.conftest import error_of

Tamis = Callable[..., Result]
SETTINGS = ("--dtype", "fp32", "--kv-memory", "16MiB", "--no-chat", "--max-tokens", 4)
PROMPT = "The sieve keeps what matters. " * 8


def inspect(tamis: Tamis, model: Path, out: Path, *options: object) -> Result:
    return tamis("inspect", "--model", model, *SETTINGS, "--out", out, *options)


def test_the_page_and_the_summary_say_what_the_plan_did(
    tamis: Tamis, endless: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "new" / "page.html"
    file.write_text(PROMPT, encoding="utf-8")
    options = ("--prompt-file", file, "--question", "What is kept?")

    result = inspect(
        tamis, endless, out, *options, "--plan", "snapkv(budget=40)", "--find", "What is"
    )

    assert result.exit_code == 0, result.output
    html = out.read_text(encoding="utf-8")
    assert "<h1>snapkv(budget=40)</h1>" in html
    assert "What became of the highlighted text" in html
    lines = result.stdout.splitlines()
    assert lines[0] == "plan: snapkv(budget=40)"
    assert lines[-1] == f"page: {out}"
    (place,) = [line for line in lines if line.startswith("'What is' at tokens ")]
    assert "KV heads keep all of it" in place
    (header,) = [i for i, line in enumerate(lines) if line.startswith("layer  tokens held")]
    assert lines[header + 1].split()[:3] == ["0", "43", "40"]  # three generated tokens are cached


def test_a_text_that_is_not_in_the_prompt_is_named(
    tamis: Tamis, endless: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    result = inspect(tamis, endless, out, "--prompt", PROMPT, "--find", "colander")
    assert "'colander' does not stand in the prompt" in error_of(result)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", PROMPT, "--plan", "snapkw()"), "snapkw"),
        ((), "no prompt; give --prompt-file FILE"),
    ],
)
def test_what_cannot_be_run_is_said_before_a_model_is_loaded(
    tamis: Tamis, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = inspect(tamis, tmp_path / "no-model", tmp_path / "page.html", *options)
    assert message in error_of(result)


def test_a_page_that_cannot_be_written_is_named_before_a_model_is_loaded(
    tamis: Tamis, tmp_path: Path
) -> None:
    result = inspect(tamis, tmp_path / "no-model", tmp_path, "--prompt", PROMPT)
    assert error_of(result) == f"cannot write the page to {tmp_path}: it is a directory"
