"""Contexts: a document is computed once, and requests of its owner go on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx
import pytest
from openai import NotFoundError
from torch import Tensor

from tamis import LLM, Plan, SamplingParams
from tamis.methods.base import Evict
from tamis.methods.views import LayerView
from tests.server.conftest import NAME, Serve, Server, wait_for

DOCUMENT = "The sieve was made in spring. It was sold in autumn. " * 3
KIVI = "kivi(bits=4, group_size=16)"


def add(server: Server, key: str | None = None, **fields: Any) -> httpx.Response:
    with client_of(server, key) as client:
        return client.post("/v1/contexts", json={"document": DOCUMENT, **fields})


def client_of(server: Server, key: str | None = None) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, timeout=60, headers=headers)


def message(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


@pytest.fixture
def empty(server: Server) -> Iterator[Server]:
    """The server, from which all contexts are deleted in the end, and with them all pages."""
    yield server
    with server.http as client:
        for context in client.get("/v1/contexts").json()["data"]:
            assert client.delete(f"/v1/contexts/{context['id']}").json()["deleted"]
    server.wait_idle()


def test_requests_go_on_from_a_document_that_is_computed_once(empty: Server, llm: LLM) -> None:
    made = add(empty, id="book").json()
    tokens = llm.encode(DOCUMENT)
    assert (made["id"], made["tokens"], made["kv_plan"]) == ("book", len(tokens), "dense")
    assert made["kv_bytes"] == made["kv_bytes_dense"] == llm.engine.layout.bytes_for(len(tokens))
    question = " When?"
    whole = tokens + llm.encode(question, begins=False)
    [expected] = llm.generate([whole], SamplingParams(max_tokens=12))
    before = empty.llm.engine.stats.prefill_tokens
    answer = empty.openai.completions.create(
        model=NAME,
        prompt=question,
        temperature=0,
        max_tokens=12,
        extra_body={"contexts": ["book"]},
    )
    assert answer.choices[0].text == expected.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(whole)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(tokens)
    assert empty.llm.engine.stats.prefill_tokens - before == len(whole) - len(tokens)


def test_several_completions_of_several_prompts_go_on_from_one(empty: Server) -> None:
    add(empty, id="book")
    fields: dict[str, Any] = {"max_tokens": 6, "contexts": ["book"], "n": 2, "echo": True}
    both = empty.complete([" When?", " Who?"], **fields).json()
    texts = [choice["text"] for choice in both["choices"]]
    assert texts[0] == texts[1]  # greedy
    for prompt, text in zip([" When?", " Who?"], texts[::2], strict=True):
        assert text.startswith(prompt)  # what goes on is repeated, the document is not
        assert empty.complete(prompt, **fields).json()["choices"][0]["text"] == text
    scored = empty.complete(" When?", **fields, logprobs=1)
    assert "does not compute its prompt" in message(scored, 400)


def test_a_conversation_goes_on_from_a_document_under_its_plan(empty: Server, llm: LLM) -> None:
    kept = add(empty, id="book", kv_plan="streamingllm(budget=32)").json()
    assert kept["kv_bytes"] < kept["kv_bytes_dense"]
    messages: Any = [{"role": "user", "content": "When?"}]
    stream = empty.openai.chat.completions.create(
        model=NAME,
        messages=messages,
        temperature=0,
        max_tokens=9,
        stream=True,
        extra_body={"contexts": ["book"]},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    bos = llm.model.tokenizer.bos_token_id  # type: ignore[union-attr]
    ids = llm.encode_chat(messages)
    alone = LLM(llm.model, kv_memory="16MiB")
    context = alone.add_context(DOCUMENT, "streamingllm(budget=32)")
    question = ids[1:] if ids[0] == bos else ids
    [expected] = alone.generate([question], SamplingParams(max_tokens=9), context=context)
    assert text == expected.text


def test_contexts_are_listed_shown_and_deleted(empty: Server) -> None:
    made = [add(empty, id="a").json(), add(empty, document=[1, 2, 3]).json()]
    assert made[1]["id"].startswith("ctx-")
    assert made[1]["tokens"] == 3
    with empty.http as client:
        assert client.get("/v1/contexts").json() == {"object": "list", "data": made}
        assert client.get("/v1/contexts/a").json() == made[0]
        metrics = client.get("/metrics").text
        assert "tamis_contexts 2.0" in metrics
        assert f"tamis_context_bytes {float(made[0]['kv_bytes'] + made[1]['kv_bytes'])}" in metrics
        assert message(add(empty, id="a"), 409).startswith("there is a context 'a' already")
        assert client.delete("/v1/contexts/a").json()["id"] == "a"
        for answer in (client.get("/v1/contexts/a"), client.delete("/v1/contexts/a")):
            assert "no context 'a'" in message(answer, 404)
        assert "tamis_contexts 1.0" in client.get("/metrics").text
    assert add(empty, id="a").status_code == 200


def test_an_unknown_context_is_not_found(empty: Server) -> None:
    with pytest.raises(NotFoundError, match="no context 'lost'"):
        empty.openai.completions.create(
            model=NAME, prompt="x", extra_body={"contexts": ["lost"]}, max_tokens=1
        )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kv_plan": "snapkv(budget=64)"}, "does not allow the plan"),
        ({"kv_plan": "nothing"}, "nothing"),
        ({"document": []}, "empty"),
        ({"document": [1, -1]}, "vocabulary"),
        ({"document": [1] * 5000}, "context is"),
        ({"document": None}, "document"),
        ({"id": "a/b"}, "id"),
        ({"id": "a@b"}, "id"),
        ({"id": ""}, "id"),
        ({"text": "x"}, "text"),
    ],
)
def test_wrong_documents_are_refused(empty: Server, fields: dict[str, Any], reason: str) -> None:
    assert reason in message(add(empty, **fields), 400)


def test_what_depends_on_the_question_is_refused(serve: Serve) -> None:
    with serve(allow_plans=("*",)) as server:
        assert "depends on the question" in message(add(server, kv_plan="snapkv(budget=64)"), 400)
        assert add(server, id="book", kv_plan=KIVI).status_code == 200
        other = server.complete("x", contexts=["book"], kv_plan="dense")
        assert "lives by the plan kivi" in message(other, 400)
        assert server.complete("x", contexts=["book"], kv_plan=KIVI).status_code == 200
        add(server, id="other", kv_plan=KIVI)
        several = server.complete("x", contexts=["book", "other"])
        assert "names 2 contexts" in message(several, 400)
        with server.http as client:
            client.delete("/v1/contexts/book")
            client.delete("/v1/contexts/other")
        server.wait_idle()


def test_several_contexts_are_joined_by_a_plan_for_it(serve: Serve, llm: LLM) -> None:
    with serve(allow_plans=("promptcache()",)) as server:
        for name in ("a", "b"):
            assert add(server, id=name, document=f"{name}. {DOCUMENT}").status_code == 200
        answer = server.complete(
            " When?", contexts=["b", "a"], kv_plan="promptcache()", max_tokens=8
        ).json()
        alone = LLM(llm.model, kv_memory="16MiB")
        names = [alone.add_context(f"{name}. {DOCUMENT}") for name in ("b", "a")]
        [expected] = alone.generate(
            [" When?"], SamplingParams(max_tokens=8), "promptcache()", context=names
        )
        assert answer["choices"][0]["text"] == expected.text


def test_contexts_belong_to_the_key_that_made_them(serve: Serve) -> None:
    with serve(api_keys=("mine", "yours")) as server:
        assert add(server, "mine", id="book").status_code == 200
        with client_of(server, "yours") as yours:
            assert yours.get("/v1/contexts").json()["data"] == []
            body = {"model": NAME, "prompt": "x", "contexts": ["book"], "max_tokens": 1}
            for answer in (
                yours.get("/v1/contexts/book"),
                yours.delete("/v1/contexts/book"),
                yours.post("/v1/completions", json=body),
            ):
                assert "no context 'book'" in message(answer, 404)
            assert add(server, "yours", id="book", document=[1, 2]).status_code == 200
            assert yours.post("/v1/completions", json=body).status_code == 200
            yours.delete("/v1/contexts/book")
        with client_of(server, "mine") as mine:
            assert mine.get("/v1/contexts/book").json()["tokens"] > 2
            mine.delete("/v1/contexts/book")
        server.wait_idle()


def test_all_contexts_together_keep_to_the_operators_limit(serve: Serve, llm: LLM) -> None:
    tokens = llm.encode(DOCUMENT)
    one = llm.engine.layout.bytes_for(len(tokens))
    with serve(context_memory=2 * one, max_prompt_tokens=3 * len(tokens)) as server:
        assert [add(server, id=name).status_code for name in "ab"] == [200, 200]
        engine = server.llm.engine
        kept = engine.cache.bytes_in_use
        assert kept == 2 * one
        before = engine.stats.prefill_tokens
        assert "delete one" in message(add(server), 400)
        assert engine.stats.prefill_tokens == before  # it was full: nothing was computed
        with server.http as client:
            client.delete("/v1/contexts/a")
            too_long = message(add(server, document=tokens * 3), 400)
            assert engine.stats.prefill_tokens == before  # nor what could never fit
            assert "delete one" in too_long
            assert "delete one" in message(add(server, document=tokens + [1] * 100), 400)
            assert engine.stats.prefill_tokens > before
            assert engine.cache.bytes_in_use == one
            assert add(server, id="a").status_code == 200
            client.delete("/v1/contexts/a")
            client.delete("/v1/contexts/b")
            assert "this server takes" in message(add(server, document=tokens * 4), 400)
        server.wait_idle()


def test_a_client_that_goes_away_takes_its_unfinished_context_along(serve: Serve) -> None:
    with serve(engine={"max_batch_tokens": 4}) as server:
        with server.http as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/contexts", json={"document": [1] * 450, "id": "x"}, timeout=0.05)
        server.wait_idle()
        assert server.llm.engine.stats.prefill_tokens < 450
        assert add(server, document=[1], id="x").status_code == 200
        with server.http as client:
            client.delete("/v1/contexts/x")
        server.wait_idle()


def test_the_time_for_a_request_holds_for_contexts(serve: Serve) -> None:
    with serve(engine={"max_batch_tokens": 1}, request_timeout=0.1) as server:
        assert "took too long" in message(add(server, document=[1] * 450), 504)
        server.wait_idle()


def test_a_request_goes_on_to_its_end_when_its_context_is_deleted(empty: Server) -> None:
    add(empty, id="book")
    body = {"model": NAME, "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with empty.http as client:
        body |= {"contexts": ["book"], "temperature": 0}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert empty.http.delete("/v1/contexts/book").status_code == 200
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@dataclass(frozen=True)
class Failing(Evict):
    """Fails when the document is computed."""

    paper: ClassVar[str] = "none"
    budget: int = 8

    def scores(self, view: LayerView) -> Tensor:
        raise ValueError("no scores today")


def test_a_failure_is_told_and_leaves_nothing(serve: Serve) -> None:
    with serve(engine={"plan": Plan((Failing(),))}, allow_plans=("dense",)) as server:
        assert "no scores today" in message(add(server, id="x"), 500)
        server.wait_idle()
        assert add(server, id="x", kv_plan="dense").status_code == 200
        with server.http as client:
            client.delete("/v1/contexts/x")


def test_two_at_once_do_not_take_the_same_name(serve: Serve) -> None:
    with serve(engine={"max_batch_tokens": 4}) as server:
        with ThreadPoolExecutor(2) as pool:
            body = {"document": [1] * 300, "id": "x"}
            both = [pool.submit(add, server, **body) for _ in range(2)]
            assert sorted(answer.result().status_code for answer in both) == [200, 409]
        with server.http as client:
            client.delete("/v1/contexts/x")
        wait_for(lambda: len(server.service.contexts) == 0)
        server.wait_idle()
