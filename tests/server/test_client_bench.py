"""`tamis client-bench` against a live server: what it reports is what the server did."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tamis.cli.app import app
from tests.server.conftest import NAME, Serve, Server, wait_for

ENDLESS = '{"ignore_eos": true}'


def bench(server: Server, *options: object) -> Result:
    command = ["client-bench", "--url", f"{server.url}/v1", *map(str, options)]
    return CliRunner().invoke(app, command)


def test_it_reports_what_the_server_did(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with serve(engine={"prefix_cache": True, "page_size": 16}) as server:
        options = ("--rate", 40, "--requests", 30, "--prompt", "uniform(60, 200)", "--output", 7)
        options += ("--shared", 0.5, "--body", ENDLESS, "--ttft", 60, "--tpot", 10)
        result = bench(server, *options, "--json", file)
        assert result.exit_code == 0, result.output
        wait_for(lambda: not server.service.admission.n_open)
        served = server.service.recent.newest(100)
        stats = server.llm.engine.prefixes
    assert "30 sent, 30 answered, 0 failed" in result.stdout
    assert "30 of 30 with a first token within 60 s" in result.stdout
    written = json.loads(file.read_text())
    assert written["target"]["model"] == NAME
    assert "api_key" not in written["target"]
    outcomes = written["requests"]
    assert [o["output_tokens"] for o in outcomes] == [7] * 30
    # Two requests told how many tokens a word is.
    assert len(served) == 32
    prompts = sorted(o["prompt_tokens"] for o in outcomes)
    assert prompts == sorted(ended.prompt_tokens for ended in served[:30])
    assert 50 <= prompts[0] < prompts[-1] <= 220
    assert stats.hit_tokens > 0.2 * stats.looked_up_tokens
    for outcome in outcomes:
        assert 0 < outcome["ttft_s"] <= outcome["total_s"]
        assert outcome["tpot_s"] is None or 0 < outcome["tpot_s"] < 10
    assert written["summary"]["good"] == 30


def test_conversations_are_measured_too(server: Server) -> None:
    result = bench(server, "--chat", "--rate", 50, "--requests", 3, "--prompt", 80, "--output", 4)
    assert result.exit_code == 0, result.output
    assert "3 sent, 3 answered" in result.stdout


def test_refusals_are_counted_by_what_they_say(serve: Serve) -> None:
    with serve(max_requests=1, api_keys=("secret",)) as server:
        options = ("--rate", 1000, "--requests", 12, "--prompt", 100, "--output", 100)
        result = bench(server, *options, "--body", ENDLESS, "--api-key", "secret")
        locked = bench(server, *options, "--api-key", "wrong")
    assert "HTTP 429" in result.stdout
    assert re.search(r" [1-9]\d* failed", result.stdout)
    assert locked.exit_code == 2
    assert "HTTP 401" in locked.stderr


def test_ctrl_c_reports_what_there_is(server: Server) -> None:
    command = [sys.executable, "-m", "tamis", "client-bench", "--url", f"{server.url}/v1"]
    command += ["--rate", "20", "--duration", "600", "--prompt", "40", "--output", "4"]
    before = len(server.service.recent.newest(256))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(server.service.recent.newest(256)) > before + 4)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "answered" in stdout
    assert "goodput" in stdout
    assert "Traceback" not in stderr
    server.wait_idle()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--url", "localhost"), "no address"),
        (("--url", "http://127.0.0.1:9/v1"), "does not answer"),
        (("--rate", 0), "rate is 0"),
        (("--requests", 0), "requests is 0"),
        (("--prompt", "long"), "no distribution"),
        (("--shared", 2), "shared is 2"),
        (("--body", "[]"), "must be a JSON object"),
        (("--body", "{"), "not JSON"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(options: tuple[object, ...], reason: str) -> None:
    result = CliRunner().invoke(app, ["client-bench", *map(str, options)])
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
