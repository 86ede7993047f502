"""What is refused, with which status, and in words that help; nothing of it disturbs the server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tamis.engine.engine import Engine
from tamis.errors import ConfigError
from tamis.server.settings import Settings
from tests.server.conftest import NAME, Serve, Server

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def strict(serve: Serve) -> Iterator[Server]:
    """A server with every limit low."""
    with serve(
        api_keys=KEYS,
        max_body=10_000,
        max_prompt_tokens=40,
        max_output_tokens=20,
        max_choices=4,
        body_timeout=0.5,
        cors_origins=("https://example.org",),
        engine={"kv_memory": "256KiB"},
    ) as running:
        yield running


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error that a response carries, which has OpenAI's form."""
    assert response.status_code >= 400, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"model": "other"}, 404, "use 'tiny'"),
        ({"temperature": 3}, 400, "temperature: Input should be less than"),
        ({"temperature": "1"}, 400, "temperature: Input should be a valid number"),
        ({"kvplan": "dense"}, 400, "kvplan: Extra inputs"),
        ({"kv_plan": "snapkw"}, 400, "did you mean 'snapkv'"),
        ({"kv_plan": "snapkv(budget=0.1)"}, 400, "it allows 'dense', 'streamingllm(budget=32"),
        ({"prompt": []}, 400, "from 1 to 64 completions"),
        ({"prompt": [[]]}, 400, "empty"),
        ({"prompt": [1, 2, 9999]}, 400, "vocabulary"),
        ({"prompt": "x" * 600}, 400, "context is 512 tokens"),
        ({"logit_bias": {"a": 1}}, 400, "not a token id"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias of token 1"),
        ({"logit_bias": {"999": 1}}, 400, "names token 999"),
        ({"n": 0}, 400, "n: Input"),
        ({"n": 65}, 400, "from 1 to 64 completions"),
        ({"best_of": 3}, 400, "best_of must equal n"),
        ({"max_tokens": 0}, 400, "only makes sense with echo"),
        ({"echo": True, "stream": True}, 400, "echo is not streamed"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"stop": [""]}, 400, "stop"),
        ({"top_k": 0}, 400, "top_k is 0"),
        ({"response_format": {"type": "json_schema"}}, 400, "json_schema is missing"),
    ],
)
def test_a_wrong_field_is_named(
    server: Server, fields: dict[str, Any], status: int, reason: str
) -> None:
    body = {"prompt": "x", **fields}
    response = server.complete(**body)
    assert response.status_code == status
    assert reason in error_of(response)["message"]


@pytest.mark.parametrize(
    ("messages", "fields", "reason"),
    [
        ([], {}, "messages"),
        ([{"role": "tool", "content": "x"}], {}, "role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages"),
        ([{"role": "user", "content": "x"}], {"tools": []}, "tools: Extra inputs"),
        ([{"role": "user", "content": "x"}], {"top_logprobs": 2}, "needs logprobs"),
    ],
)
def test_a_conversation_that_cannot_be_had_is_refused(
    server: Server, messages: Any, fields: dict[str, Any], reason: str
) -> None:
    with server.http as client:
        body = {"model": NAME, "messages": messages, **fields}
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert reason in error_of(response)["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model"', b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 5000, b"9" * 5000],
)
def test_a_body_that_is_no_request_is_refused(server: Server, body: bytes) -> None:
    for kind in ("application/json", "text/plain"):
        with server.http as client:
            response = client.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert response.status_code == 400
        assert error_of(response)["type"] == "invalid_request_error"
    assert server.complete(max_tokens=1).status_code == 200


def test_half_a_character_is_refused(server: Server) -> None:
    for body in (
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "stop": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "kv_plan": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "x"}',
    ):
        with server.http as client:
            response = client.post(
                "/v1/completions", content=body, headers={"Content-Type": "application/json"}
            )
        assert response.status_code == 400, body
        assert "unicode" in error_of(response)["message"]


def test_an_unknown_path_or_verb_is_answered_in_the_same_form(server: Server) -> None:
    with server.http as client:
        assert error_of(client.get("/v2"))["message"] == "GET /v2: not found"
        response = client.get("/v1/completions")
        assert response.status_code == 405
        assert error_of(response)["message"].endswith("method not allowed")


@pytest.mark.parametrize(
    "header",
    [{}, *({"Authorization": a} for a in ("Bearer wrong", "Bearer", "Basic first-key", "é"))],
)
def test_without_a_valid_key_nothing_is_answered(strict: Server, header: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in header.items()}
    with strict.http as client:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            response = client.get(path, headers=encoded)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
        assert client.post("/v1/completions", content=b"{", headers=encoded).status_code == 401
        for path in ("/health", "/ready"):
            assert client.get(path, headers=encoded).status_code == 200


def test_every_key_opens(strict: Server) -> None:
    with strict.http as client:
        for key in KEYS:
            header = {"Authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=header).status_code == 200


def ask(strict: Server, **fields: Any) -> httpx.Response:
    body = {"model": NAME, "prompt": "x", **fields}
    with strict.http as client:
        return client.post(
            "/v1/completions", json=body, headers={"Authorization": f"Bearer {KEYS[1]}"}
        )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "x" * 40}, "41 tokens; this server takes 40"),
        ({"max_tokens": 21}, "at most 20"),
        ({"prompt": ["x"] * 3, "n": 2}, "from 1 to 4 completions"),
    ],
)
def test_limits_of_tokens_and_completions_hold(
    strict: Server, fields: dict[str, Any], reason: str
) -> None:
    response = ask(strict, **fields)
    assert response.status_code == 400
    assert reason in error_of(response)["message"]


def test_without_max_tokens_the_servers_limit_holds(strict: Server) -> None:
    answer = ask(strict, max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 20


def test_a_request_that_can_never_fit_the_memory_is_refused(serve: Serve) -> None:
    with serve(engine={"kv_memory": "256KiB"}) as server:
        response = server.complete("x" * 480, max_tokens=8)
        assert response.status_code == 400
        assert error_of(response)["code"] == "kv_memory_exceeded"
        assert server.complete("x", max_tokens=8).status_code == 200


def test_who_would_wait_too_long_is_told_when_to_come_back(serve: Serve) -> None:
    with serve(max_wait=0.5, engine={"max_batch_tokens": 64}) as server:
        assert server.complete("x", max_tokens=4).status_code == 200

        def slow(engine: Engine) -> None:
            engine.scheduler.costs.prompt_token_s = 0.02  # 400 tokens: 8 s

        asyncio.run(server.llm.read(slow))
        response = server.complete("x" * 399, max_tokens=4)
        assert response.status_code == 429
        assert error_of(response)["code"] == "overloaded"
        assert "expected in 8.0 s, where 0.5 s are the most" in error_of(response)["message"]
        assert 7 <= int(response.headers["Retry-After"]) <= 8
        assert server.complete("y" * 8, max_tokens=4).status_code == 200
        server.wait_idle()


def send_slowly(port: int, head: str, parts: Callable[[], Iterator[bytes]]) -> tuple[bytes, int]:
    """The response to a request whose body comes in parts, and the bytes that were sent of it."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode())
        sent = 0
        try:
            for part in parts():
                connection.sendall(part)
                sent += len(part)
        except OSError:
            pass  # refused meanwhile
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
        return answer, sent


HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    f"Authorization: Bearer {KEYS[0]}\r\n"
)


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_of_100_mb_is_refused_while_it_comes(strict: Server, stated: bool) -> None:
    size, part = 100_000_000, b" " * (1 << 16)
    head = HEAD + (
        f"Content-Length: {size}\r\n\r\n" if stated else "Transfer-Encoding: chunked\r\n\r\n"
    )

    def parts() -> Iterator[bytes]:
        for _ in range(size // len(part)):
            yield part if stated else b"%x\r\n%s\r\n" % (len(part), part)

    began = time.monotonic()
    answer, sent = send_slowly(strict.port, head, parts)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer
    assert sent < size or time.monotonic() - began < 2  # cut off, or thrown away at once
    assert ask(strict, max_tokens=1).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(strict: Server) -> None:
    answer, _ = send_slowly(strict.port, HEAD + "Content-Length: 10\r\n\r\n", lambda: iter([b"{"]))
    assert answer.startswith(b"HTTP/1.1 408")


def test_pages_of_other_origins_may_not_call_unless_listed(strict: Server, server: Server) -> None:
    ask_first = {"Access-Control-Request-Method": "POST", "Origin": "https://example.org"}
    with strict.http as client:
        allowed = client.options("/v1/completions", headers=ask_first)
        other = client.options(
            "/v1/completions", headers={**ask_first, "Origin": "https://example.com"}
        )
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert "Access-Control-Allow-Origin" not in other.headers
    with server.http as client:
        response = client.get("/v1/models", headers={"Origin": "https://example.org"})
    assert "Access-Control-Allow-Origin" not in response.headers


def test_any_plan_may_be_allowed(serve: Serve) -> None:
    with serve(allow_plans=("*",)) as server:
        assert server.complete(kv_plan="streamingllm(budget=16)", max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"port": 1 << 16}, "port"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens"),
        ({"max_wait": 0}, "max_wait"),
        ({"context_memory": -1}, "context_memory"),
        ({"api_keys": ("",)}, "API key"),
        ({"log_format": "xml"}, "log_format"),
        ({"allow_plans": ("snapkw",)}, "snapkw"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=reason):
        Settings(name="x", **settings)
