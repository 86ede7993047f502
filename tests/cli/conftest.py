"""The command line, called in this process, and the models it is called with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tamis.cli.app import app
from tamis.cli.demo_model import library_text, save_random_model

Tamis = Callable[..., Result]


@pytest.fixture
def tamis() -> Tamis:
    """`tamis("run", "--model", ...)` is the result of that command; `input=` is its stdin."""
    runner = CliRunner()

    def invoke(*arguments: object, input: str | bytes | None = None) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments], input=input)

    return invoke


@pytest.fixture(scope="session")
def llama(tiny_dir: Callable[[str], Path]) -> Path:
    """A Llama of 3 layers, 4 heads on 2 KV heads of 16, a context of 512, with a chat template."""
    return tiny_dir("llama")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model: no end-of-sequence token, no chat template, a context of 32,768."""
    directory = tmp_path_factory.mktemp("endless")
    save_random_model(directory, library_text())
    return directory


def error_of(result: Result) -> str:
    """The one line that a failed command printed, its mark removed; asserts that it is one."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")
