"""The worked example of docs/writing-a-method.md is what the page says, and runs as it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "keep_norms"
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "docs/writing-a-method.md").read_text(), re.M | re.S
)
FILES = [file.read_text() for file in sorted(EXAMPLE.iterdir()) if file.is_file()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the example is installed, by its own pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (info / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in entries.items())
            for group, entries in project["entry-points"].items()
        )
    )
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{EXAMPLE}", "OMP_NUM_THREADS": "1"}


def python(environment: dict[str, str], *arguments: str) -> str:
    """What a Python process prints; asserts that it succeeds."""
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_quoted(block: str) -> bool:
    return any(block in file for file in FILES)


def test_the_command_line_knows_the_method(installed: dict[str, str]) -> None:
    shown = python(installed, "-m", "tamis", "methods", "knorm")

    assert "knorm, stage evict" in shown
    assert "arXiv:2406.11430" in shown
    assert "skip_layers=2, int, at least 0" in shown


def test_the_examples_own_tests_pass(installed: dict[str, str]) -> None:
    ran = python(installed, "-m", "pytest", "-p", "no:cacheprovider", str(EXAMPLE))

    assert "[100%]" in ran


def test_every_quotation_is_the_files_own_text() -> None:
    quoted = [text for language, text in BLOCKS if language != "sh" and is_quoted(text)]

    assert {language for language, _ in BLOCKS} == {"python", "toml", "sh"}
    assert all(is_quoted(text) for language, text in BLOCKS if language == "toml")
    for part in (
        "class KNorm(Evict)",
        "budget: int",
        "def scores",
        "def keep",
        "def test_it_keeps",
    ):
        assert any(part in text for text in quoted), part


def test_everything_else_on_the_page_runs_in_order(installed: dict[str, str]) -> None:
    code = [text for language, text in BLOCKS if language == "python" and not is_quoted(text)]

    assert sum("llm.generate" in text for text in code) >= 2
    python(installed, "-c", "\n".join(map(textwrap.dedent, code)))


def test_a_request_runs_by_the_methods_name(installed: dict[str, str]) -> None:
    wanted = ("--plan", "knorm(budget=0.3)", "--prompt", "def main():\n" * 200, "--max-tokens", "4")

    said = python(installed, "-m", "tamis", "run", "--model", "reference", *wanted, "--json")

    metrics = json.loads(said)["metrics"]
    assert metrics["kv_bytes"] < metrics["kv_bytes_dense"]
