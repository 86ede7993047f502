"""What the server says of itself: metrics for Prometheus, logs without prompts, probes."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tamis.server.logs import Formatter
from tests.server.conftest import NAME, Serve, Server, wait_for


def metrics(server: Server) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by name, with their labels."""
    with server.http as client:
        text = client.get("/metrics").text
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_metrics_follow_what_happens(serve: Serve) -> None:
    plan = "kivi(bits=4, group_size=16)"
    with serve(allow_plans=(plan,)) as server:
        before = metrics(server)
        assert before["tamis_requests_open"] == [({}, 0)]
        with server.http as client:
            body = {"model": NAME, "prompt": "x" * 300, "stream": True, "max_tokens": 150}
            body |= {"ignore_eos": True, "kv_plan": plan, "temperature": 0}
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200
                lines = response.iter_lines()
                next(lines)
                during = metrics(server)
        assert during["tamis_requests_open"] == [({}, 1)]
        assert during["tamis_sequences_running"] == [({}, 1)]
        formats = {labels["format"] for labels, n in during["tamis_kv_pages"] if n}
        assert len(formats) == 2  # exact pages, and encoded ones
        assert {labels["tier"] for labels, _ in during["tamis_kv_pages"]} >= {"device"}
        server.wait_idle()
        assert server.complete("x", max_tokens=5, ignore_eos=True).status_code == 200
        assert server.complete("x", model="y").status_code == 404
        refused = {"path": "/v1/completions", "status": "404"}  # counted when it has been sent
        wait_for(lambda: (refused, 1) in metrics(server)["tamis_http_responses_total"])
        after = metrics(server)
        assert sum(n for _, n in after["tamis_kv_pages"]) == 0
        assert ({"finish_reason": "length"}, 1) in after["tamis_completions_total"]
        for name in ("time_to_first_token", "time_per_output_token", "queue_time", "request_time"):
            assert after[f"tamis_{name}_seconds_count"] == [({}, 1)]
        assert after["tamis_prefill_tokens_total"][0][1] >= 302
        assert after["tamis_decode_tokens_total"][0][1] >= 4


def test_a_request_is_logged_with_its_cost_and_without_its_text(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the treasure lies under the oak"
    with caplog.at_level(logging.INFO):
        answer = server.complete(secret, max_tokens=6)
        server.complete(secret, temperature="hot")
        with server.http as client:
            messages = [{"role": "user", "content": secret}]
            client.post("/v1/chat/completions", json={"model": "no", "messages": messages})
        server.wait_idle()
        # A request is logged when its answer has been sent, so maybe after the client has it.
        wait_for(lambda: sum(r.getMessage() == "request" for r in caplog.records) == 3)
    lines = [Formatter("json").format(record) for record in caplog.records]
    requests = [json.loads(line) for line in lines if '"event": "request"' in line]
    first, second, third = requests
    assert first["request_id"] == answer.headers["X-Request-Id"]
    assert first["prompt_tokens"] == len(secret) + 1
    assert first["output_tokens"] == 6
    assert (first["path"], first["status"], first["plan"]) == ("/v1/completions", 200, "dense")
    assert first["duration_s"] > 0
    assert (second["status"], third["status"]) == (400, 404)
    assert "treasure" not in "".join(lines)
    assert answer.json()["choices"][0]["text"] not in "".join(lines)


def test_a_record_is_one_line_with_its_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord(
            "tamis", logging.ERROR, __file__, 1, "failed\nbadly", (), sys.exc_info()
        )
    record.fields = {"n": 3}
    line = Formatter("json").format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["event"], fields["n"], fields["level"]) == ("failed\nbadly", 3, "error")
    assert "ValueError: why" in fields["traceback"]
    text = Formatter("text").format(record).splitlines()
    assert text[0].endswith("badly n=3") or text[1].endswith("n=3")


def test_probes_answer(server: Server) -> None:
    with server.http as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
