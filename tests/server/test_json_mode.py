"""`response_format`: whatever the model would rather say, the answer is JSON that fits."""

from __future__ import annotations

import json

import openai
import pytest
from pydantic import BaseModel

from tests.server.conftest import NAME, Server

jsonschema_rs = pytest.importorskip("jsonschema_rs")

MESSAGES = [{"role": "user", "content": "a record"}]


class Sieve(BaseModel):
    name: str
    meshes: list[int]
    fine: bool


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("max_tokens", [45, 200])
def test_a_schema_is_kept(server: Server, temperature: float, max_tokens: int) -> None:
    answer = server.openai.chat.completions.parse(
        model=NAME,
        messages=MESSAGES,
        response_format=Sieve,
        temperature=temperature,
        seed=5,
        max_tokens=max_tokens,
        n=2,
    )
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Sieve)


def test_a_stream_keeps_it_too(server: Server) -> None:
    schema = Sieve.model_json_schema()
    events = server.openai.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        stream=True,
        max_tokens=80,
    )
    text = "".join(choice.delta.content or "" for event in events for choice in event.choices)
    assert jsonschema_rs.is_valid(schema, json.loads(text))


def test_any_object_will_do_for_json_object(server: Server) -> None:
    for seed in range(4):
        answer = server.openai.completions.create(
            model=NAME,
            prompt="x",
            max_tokens=30,
            seed=seed,
            extra_body={"response_format": {"type": "json_object"}},
        )
        assert isinstance(json.loads(answer.choices[0].text), dict)


@pytest.mark.parametrize(
    ("schema", "max_tokens", "reason"),
    [
        ({"type": "sieve"}, 50, "Invalid type"),
        ({"not": {}}, 50, "not"),
        (Sieve.model_json_schema(), 5, "allow at least as many"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    server: Server, schema: dict[str, object], max_tokens: int, reason: str
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=reason):
        server.openai.chat.completions.create(
            model=NAME, messages=MESSAGES, response_format=wanted, max_tokens=max_tokens
        )
