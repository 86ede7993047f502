"""`tamis serve` as a process: how it is configured, how it stops, and that it comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import pytest

pytest.importorskip("uvicorn")


@dataclass
class Process:
    """A running `tamis serve`."""

    popen: subprocess.Popen[bytes]
    url: str


Start = Callable[..., "contextmanager[Process]"]


@pytest.fixture
def start(tiny_dir: Callable[[str], Path]) -> Start:
    """`with start("--option", ..., env={...}) as process`, which is killed if a test leaves it."""

    @contextmanager
    def run(
        *options: object,
        port: int = 0,
        env: dict[str, str] | None = None,
        output: int | IO[bytes] = subprocess.PIPE,
    ) -> Iterator[Process]:
        if port == 0:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
        command = [sys.executable, "-m", "tamis", "serve", "--model", tiny_dir("llama")]
        command += ["--port", port, "--dtype", "fp32", "--kv-memory", "16MiB", *options]
        popen = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | (env or {}),
            stdout=output,
            stderr=output,
        )
        process = Process(popen, f"http://127.0.0.1:{port}")
        try:
            wait_ready(process)
            yield process
        finally:
            popen.kill()
            popen.communicate()

    return run


def wait_ready(process: Process) -> None:
    end = time.monotonic() + 60
    while True:
        assert time.monotonic() < end
        assert process.popen.poll() is None, process.popen.communicate()[1].decode()
        try:
            if httpx.get(f"{process.url}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.05)


BODY = {"model": "llama", "prompt": "hello", "temperature": 0, "ignore_eos": True}


def test_sigterm_lets_open_requests_end_and_refuses_new_ones(start: Start) -> None:
    with start("--name", "llama") as process, httpx.Client(timeout=60) as client:
        body = {**BODY, "max_tokens": 400, "stream": True}
        with client.stream("POST", f"{process.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.popen.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx.ConnectError):
                httpx.post(f"{process.url}/v1/completions", json=BODY)
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        _, stderr = process.popen.communicate(timeout=60)
        assert process.popen.returncode == 0
        lines = stderr.decode().splitlines()
        logged = [json.loads(line)["event"] for line in lines if line[:1] == "{"]
        assert logged[0] == "listening"
        assert logged[-3:] == ["draining", "request", "stopped"]


def test_what_does_not_end_in_time_gets_an_error(start: Start) -> None:
    options = ("--name", "llama", "--drain-timeout", 0.2, "--max-batch-tokens", 1)
    with start(*options) as process, httpx.Client(timeout=60) as client:
        body = {**BODY, "max_tokens": 500, "n": 1, "stream": True}
        with client.stream("POST", f"{process.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.popen.send_signal(signal.SIGTERM)
            process.popen.send_signal(signal.SIGTERM)  # twice: at once
            events = [line for line in lines if line.startswith("data: {")]
        assert "the server stops" in json.loads(events[-1][6:])["error"]["message"]
        assert process.popen.wait(timeout=30) == 0


def test_after_kill_9_it_comes_back_on_the_same_port(start: Start) -> None:
    with start("--name", "llama") as process:
        url, port = process.url, int(process.url.rsplit(":", 1)[1])
        body = {**BODY, "max_tokens": 400, "stream": True}
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.popen.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
    with start("--name", "llama", port=port):
        answer = httpx.post(f"{url}/v1/completions", json={**BODY, "max_tokens": 5})
        assert answer.json()["usage"]["completion_tokens"] == 5


def test_flags_beat_the_environment_and_that_the_file(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "tamis.toml"
    config.write_text(
        'name = "from-file"\nmax_output_tokens = 3\nmax-choices = 2\n'
        'context_memory = "1KiB"\n'
        'api_key = ["file-key", "other-key"]\n'
    )
    env = {"TAMIS_MAX_OUTPUT_TOKENS": "4", "TAMIS_NAME": "from-env"}
    options = ("--config", config, "--name", "from-flag", "--order", "fair")
    with start(*options, env=env) as process:
        url = f"{process.url}/v1/completions"
        header = {"Authorization": "Bearer other-key"}
        body = {**BODY, "model": "from-flag", "max_tokens": None}
        assert httpx.post(url, json=body).status_code == 401
        answer = httpx.post(url, json=body, headers=header).json()
        assert answer["usage"]["completion_tokens"] == 4
        assert httpx.post(url, json={**body, "n": 3}, headers=header).status_code == 400
        url = f"{process.url}/v1/contexts"
        answer = httpx.post(url, json={"document": "x"}, headers=header).json()
        assert answer["error"]["code"] == "context_memory_exceeded"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("max_bdy = 3", "max_bdy"), ("max_body =", "is not TOML"), (None, "cannot read")],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    config = tmp_path / "tamis.toml"
    if text is not None:
        config.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tamis", "serve", "--config", config],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


def test_a_taken_port_is_said_in_one_line(start: Start) -> None:
    with start() as process:
        port = process.url.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "tamis", "serve", "--port", port, "--kv-memory", "16MiB"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
