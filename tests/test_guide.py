"""Guided output: whatever is chosen, and however few tokens there are, the JSON fits its schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tamis import LLM, SamplingParams
from tamis.errors import RequestError
from tamis.guide import JsonGuide, Vocabulary
from tests.tiny_models import EOS, VOCAB, tokenizer

jsonschema_rs = pytest.importorskip("jsonschema_rs")
pytest.importorskip("llguidance")

LINKED = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object"},
    "anything": {},
    "number": {"type": "integer"},
    "string": {"type": "string", "minLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-z]{3},[0-9]+$"},
    "linked": LINKED,
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["sieve", "mesh"]},
            "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 2},
        },
        "required": ["name", "kind", "sizes"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(tokenizer(), VOCAB, [EOS])


@pytest.fixture(scope="module")
def llm(tiny_dir: Callable[[str], Path]) -> LLM:
    return LLM(tiny_dir("llama"), dtype="float32", kv_memory="16MiB")


def random_output(vocabulary: Vocabulary, guide: JsonGuide, n_tokens: int, seed: int) -> bytes:
    """What comes out when every token is drawn evenly among those allowed."""
    random, output, text = np.random.default_rng(seed), guide.start(), b""
    for remaining in range(n_tokens, 0, -1):
        token = int(random.choice(output.allowed(remaining).nonzero()[0]))
        token = output.vet(token, remaining)
        output.observe(token)
        if token == EOS:
            break
        text += vocabulary.bytes_of(token)
        if output.finished:
            break
    return text


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_fit_the_schema_in_any_number_of_tokens(
    vocabulary: Vocabulary, name: str
) -> None:
    guide = JsonGuide(vocabulary, SCHEMAS[name])
    for extra in [*range(12), 40, 200]:
        text = random_output(vocabulary, guide, guide.least_tokens + extra, seed=extra)
        # Python makes infinity of a number such as 1e999, which JSON allows and schemas do not.
        document = json.loads(text, parse_float=lambda _: 0.5)
        assert jsonschema_rs.is_valid(SCHEMAS[name], document), text


def test_a_fork_goes_its_own_way(vocabulary: Vocabulary) -> None:
    guide = JsonGuide(vocabulary, {"enum": ["ab", "cd"]})
    first = guide.start()
    ids = dict(zip("abcd", tokenizer()("abcd")["input_ids"][1:], strict=True))
    first.observe(tokenizer()('"')["input_ids"][1])
    second = first.fork()
    first.observe(ids["a"])
    second.observe(ids["c"])
    assert first.allowed(5).nonzero()[0].tolist() == [ids["b"]]
    assert second.allowed(5).nonzero()[0].tolist() == [ids["d"]]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "sieve"}, "Invalid type"),
        ({"not": {"type": "string"}}, "not"),
        ({"enum": []}, "anyOf is empty"),
        ({"type": "string", "minLength": 10_000}, "no short text fits"),
        (
            {
                "$defs": {"n": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/n"}}},
                "$ref": "#/$defs/n",
            },
            "no short text fits",
        ),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(
    vocabulary: Vocabulary, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        JsonGuide(vocabulary, schema)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
@pytest.mark.parametrize("max_tokens", [40, 60, 300])
def test_a_model_of_random_weights_writes_valid_json(
    llm: LLM, temperature: float, max_tokens: int
) -> None:
    schema = SCHEMAS["record"]
    guide = llm.json_guide(schema)
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=1, n=3, guide=guide, logprobs=1
    )
    [output] = llm.generate("a record:", params)
    for completion in output.completions:
        assert jsonschema_rs.is_valid(schema, json.loads(completion.text)), completion.text
        assert completion.finish_reason in ("stop", "length")
        assert [entry.token_id for entry in completion.logprobs or []] == completion.token_ids


def test_a_guided_output_ends_when_it_is_complete(llm: LLM) -> None:
    params = SamplingParams(max_tokens=50, guide=llm.json_guide({"const": 12}), ignore_eos=True)
    [output] = llm.generate("x", params)
    assert (output.text.strip(), output.finish_reason) == ("12", "stop")


def test_too_few_tokens_for_any_fitting_output_are_refused(llm: LLM) -> None:
    guide = llm.json_guide(SCHEMAS["record"])
    with pytest.raises(RequestError, match="allow at least as many"):
        llm.generate("x", SamplingParams(max_tokens=10, guide=guide))
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=3, guide=guide)
