"""The command as a process: what a shell sees when it starts, is interrupted, or loses its pipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m tamis` with these arguments, killed if a test leaves it running."""
    command = [sys.executable, "-m", "tamis", *map(str, arguments)]
    # Buffered output, as it is unless someone asks otherwise: what stays in the buffer matters.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def endless_run(model: Path) -> tuple[object, ...]:
    options = ("--prompt", "def main():", "--max-tokens", 30_000, "--dtype", "fp32")
    return ("run", "--model", model, *options)


def test_help_and_version_import_nothing_slow() -> None:
    code = (
        "import sys; sys.argv = ['tamis', '--help']\n"
        "from tamis.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0
    assert "Usage: tamis" in done.stdout
    assert done.stderr == "set()\n"


def test_nothing_but_the_model_and_the_measurement_is_said(tiny_dir) -> None:
    options = ("--prompt", "x", "--max-tokens", 2, "--weights", "int8", "--kv-memory", "1MiB")
    with running("run", "--model", tiny_dir("llama"), *options) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert [line.split(" ", 1)[1][:6] for line in stderr.decode().splitlines()] == ["prompt"]


def test_ctrl_c_keeps_what_was_printed_and_exits_with_130(endless: Path) -> None:
    with running(*endless_run(endless)) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert (begun + rest).decode().strip()
    assert rest.endswith(b"\n")
    assert stderr.decode().splitlines()[-1] == "interrupted"
    assert b"Traceback" not in stderr


@pytest.mark.parametrize("command", ["run", "demo"])
def test_a_reader_that_leaves_ends_it_quietly(endless: Path, command: str) -> None:
    arguments = endless_run(endless) if command == "run" else ("demo", "--model", endless)
    with running(*arguments) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if command == "run":
            process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(timeout=60)

        assert process.returncode == 141
        lines = stderr.decode().splitlines()
        assert [line for line in lines if not line.startswith("warning: ")] == []


def test_an_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    with running("run", "--model", tmp_path, "--prompt", "x") as process:
        stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 2
    assert stdout == b""
    assert stderr.decode().count("\n") == 1
    assert stderr.startswith(b"error: ")


def test_nothing_but_the_object_is_on_stdout_with_json(endless: Path) -> None:
    with running("run", "--model", endless, "--prompt", "x", "--max-tokens", 2, "--json") as run:
        stdout, stderr = run.communicate(timeout=60)

    assert run.returncode == 0
    assert len(json.loads(stdout)["token_ids"]) == 2
    lines = [line for line in stderr.decode().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert "prompt tokens" in lines[0]
