"""What production does to a server, done to a live one."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx
import pytest
from torch import Tensor

from tamis import LLM, Plan, SamplingParams
from tamis.methods.base import Evict
from tamis.methods.views import LayerView
from tests.server.conftest import NAME, Serve, Server, wait_for

LONG = {"max_tokens": 450, "ignore_eos": True}


@contextmanager
def streaming(server: Server, **fields: Any) -> Iterator[Iterator[str]]:
    """The lines of a streamed completion that goes on for long."""
    body = {"model": NAME, "prompt": "hello", "temperature": 0, "stream": True, **LONG, **fields}
    with server.http as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        yield response.iter_lines()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_pages_within_a_step(
    server: Server, streamed: bool
) -> None:
    engine = server.llm.engine
    if streamed:
        with streaming(server) as lines:
            next(lines)
            assert engine.cache.bytes_in_use > 0
    else:
        body = {"model": NAME, "prompt": "hello", **LONG}
        with server.http as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.2)
    before = engine.stats.steps
    server.wait_idle()
    # The loop learns of it within a moment; a whole answer would have taken 450 steps.
    assert engine.stats.steps - before < 200


def test_leaving_frees_the_pages_before_the_next_step(server: Server) -> None:
    """Counted where no time passes: from the word of the loop to the engine's next step."""
    engine = server.llm.engine
    with streaming(server) as lines:
        next(lines)
        steps: list[int] = []
        abort = engine.abort

        def noting(*arguments: Any) -> Any:
            increments = abort(*arguments)
            steps.append(engine.cache.bytes_in_use)
            return increments

        engine.abort = noting  # type: ignore[method-assign]
    try:
        server.wait_idle()
    finally:
        del engine.abort  # type: ignore[method-assign]
    assert steps[-1] == 0


def test_others_go_on_when_a_client_goes_away(server: Server, llm: LLM) -> None:
    [expected] = llm.generate("other", SamplingParams(max_tokens=200, ignore_eos=True))
    with ThreadPoolExecutor(1) as pool:
        with streaming(server) as lines:
            next(lines)
            other = pool.submit(server.complete, "other", max_tokens=200, ignore_eos=True)
            next(lines)
        assert other.result().json()["choices"][0]["text"] == expected.text


@dataclass(frozen=True)
class Failing(Evict):
    """Fails when the prompt is computed."""

    paper: ClassVar[str] = "none"
    budget: int = 8

    def scores(self, view: LayerView) -> Tensor:
        raise ValueError("no scores today")


def test_an_exception_in_one_request_is_its_own(serve: Serve, llm: LLM) -> None:
    [expected] = llm.generate("other", SamplingParams(max_tokens=60, ignore_eos=True))
    with serve(engine={"plan": Plan((Failing(),))}, allow_plans=("dense",)) as server:
        with ThreadPoolExecutor(4) as pool:
            good = [
                pool.submit(
                    server.complete, "other", max_tokens=60, ignore_eos=True, kv_plan="dense"
                )
                for _ in range(3)
            ]
            failed = server.complete("x" * 30)
            with streaming(server, prompt="x" * 30) as lines:
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert failed.status_code == 500
        assert "no scores today" in failed.json()["error"]["message"]
        assert "no scores today" in events[-1]["error"]["message"]
        for response in good:
            assert response.result().json()["choices"][0]["text"] == expected.text
        server.wait_idle()


def test_a_failure_of_the_whole_step_ends_in_an_error_and_the_next_request_runs(
    server: Server,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no forward today")

    hook = server.llm.model.hf.register_forward_pre_hook(fail)
    failed = server.complete("x")
    hook.remove()
    assert failed.status_code == 500
    assert server.complete("x").status_code == 200


def test_a_failure_of_the_engine_itself_ends_in_an_error_and_the_next_request_runs(
    server: Server,
) -> None:
    scheduler = server.llm.engine.scheduler

    def fail() -> None:
        raise RuntimeError("no schedule today")

    scheduler.schedule = fail  # type: ignore[method-assign, assignment]
    failed = server.complete("x")
    del scheduler.schedule  # type: ignore[method-assign]
    assert failed.status_code == 500
    assert "RuntimeError" in failed.json()["error"]["message"]
    assert server.complete("x").status_code == 200


def test_when_the_engines_thread_dies_nobody_waits_and_health_says_so(serve: Serve) -> None:
    with serve() as server:
        with ThreadPoolExecutor(2) as pool, streaming(server) as lines:
            next(lines)

            def die() -> None:
                raise SystemExit

            server.llm.engine.step = die  # type: ignore[method-assign, assignment]
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert events[-1]["error"]["code"] == "engine_ended"
            after = pool.submit(server.complete, "x").result()
        assert after.status_code == 503
        with server.http as client:
            assert client.get("/health").status_code == 503
            assert client.get("/ready").status_code == 503


def test_a_slow_reader_is_cut_off_and_stalls_nobody(serve: Serve) -> None:
    with serve(write_timeout=1.0, engine={"max_pending": 100}) as server:
        body = json.dumps(
            {"model": NAME, "prompt": "x", "stream": True, "logprobs": 20, "n": 8, **LONG}
        )
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_for(lambda: server.llm.engine.cache.bytes_in_use > 0)
        other = server.complete("x", max_tokens=20)
        assert other.status_code == 200
        server.wait_idle()
        # What waits for it in this process is bounded; the rest lies in the system's buffers.
        answer = b""
        slow.settimeout(10)
        try:
            while part := slow.recv(65536):
                answer += part
        except OSError:
            pass  # reset by the system
        assert b"[DONE]" not in answer or b"not read as fast" in answer
        slow.close()


def test_too_many_requests_are_told_when_to_come_back(serve: Serve) -> None:
    with serve(max_requests=2) as server:
        with streaming(server) as one, streaming(server) as two:
            next(one)
            next(two)
            refused = server.complete("x")
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            assert refused.json()["error"]["type"] == "rate_limit_error"
            with server.http as client:
                assert client.get("/ready").status_code == 503
                assert client.get("/health").status_code == 200
        server.wait_idle()
        assert server.complete("x").status_code == 200


def test_requests_that_do_not_fit_together_wait_for_each_other(serve: Serve, llm: LLM) -> None:
    """A pool that holds two of twelve requests."""
    prompts = [f"{i} " * 40 for i in range(12)]
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    expected = [output.text for output in llm.generate(prompts, params)]
    room = llm.engine.cache.required_bytes(300)
    with serve(engine={"kv_memory": room, "page_size": 16, "max_batch_tokens": 128}) as server:
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(
                pool.map(lambda p: server.complete(p, max_tokens=100, ignore_eos=True), prompts)
            )
        assert [a.json()["choices"][0]["text"] for a in answers] == expected
        assert server.llm.engine.stats.preemptions > 0
        server.wait_idle()


def test_a_request_that_takes_too_long_is_ended(serve: Serve) -> None:
    with serve(request_timeout=0.3) as server:
        late = server.complete("x", **LONG)
        assert late.status_code == 504
        with streaming(server) as lines:
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["error"]["code"] == "timeout"
        server.wait_idle()


def test_outputs_under_concurrency_equal_outputs_alone(server: Server, llm: LLM) -> None:
    prompts = [f"prompt {i} " * (1 + i % 7) for i in range(24)]
    alone = [llm.generate(p, SamplingParams(max_tokens=40))[0].text for p in prompts]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda p: server.complete(p, max_tokens=40), prompts))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == alone


def test_the_loop_answers_while_a_long_prompt_is_computed(serve: Serve) -> None:
    """The engine's thread computes; health checks do not wait for it."""
    with serve() as server, server.http as client:
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                server.complete("x" * 500, max_tokens=8)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            times = []
            for _ in range(40):
                began = time.perf_counter()
                assert client.get("/health").status_code == 200
                times.append(time.perf_counter() - began)
        finally:
            stop.set()
            thread.join()
        assert sorted(times)[len(times) // 2] < 0.1
