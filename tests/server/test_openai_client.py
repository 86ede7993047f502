"""The official client against every endpoint: what it gets is what the engine says."""

from __future__ import annotations

import openai
import pytest

from tamis import LLM, SamplingParams
from tests.server.conftest import NAME, Server

TEMPLATE = "<bos>[user]hi\n[assistant]"
MESSAGES = [{"role": "user", "content": "hi"}]


def test_models_are_listed_and_found(server: Server) -> None:
    [model] = server.openai.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert server.openai.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        server.openai.models.retrieve("gpt")


def test_a_completion_is_what_the_engine_generates(server: Server, llm: LLM) -> None:
    [expected] = llm.generate("hello", SamplingParams(max_tokens=8))
    answer = server.openai.completions.create(
        model=NAME, prompt="hello", max_tokens=8, temperature=0
    )
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["kv_bytes"] == expected.metrics.kv_bytes
    assert answer.usage.model_extra["kv_bytes_dense"] == expected.metrics.kv_bytes_dense


def test_prompts_are_texts_or_ids_one_or_many(server: Server, llm: LLM) -> None:
    ids = llm.encode("hello")
    other = llm.encode("other")
    text = llm.generate(ids, SamplingParams(max_tokens=5))[0].text
    second = llm.generate(other, SamplingParams(max_tokens=5))[0].text
    for prompt, texts in (
        (ids, [text]),
        (["hello", "other"], [text, second]),
        ([ids, other], [text, second]),
    ):
        answer = server.openai.completions.create(
            model=NAME, prompt=prompt, max_tokens=5, temperature=0
        )
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))


def test_a_streamed_completion_adds_up(server: Server) -> None:
    whole = server.openai.completions.create(
        model=NAME, prompt=["one", "two"], max_tokens=9, n=2, seed=3, logprobs=2
    )
    texts = dict.fromkeys(range(4), "")
    tokens: dict[int, list[str]] = {i: [] for i in range(4)}
    offsets: dict[int, list[int]] = {i: [] for i in range(4)}
    reasons = {}
    for event in server.openai.completions.create(
        model=NAME, prompt=["one", "two"], max_tokens=9, n=2, seed=3, logprobs=2, stream=True
    ):
        for choice in event.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
            reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert list(reasons.values()) == [choice.finish_reason for choice in whole.choices]
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert tokens[choice.index] == choice.logprobs.tokens


def test_echo_gives_the_prompt_and_its_logprobs(server: Server, llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scored = llm.generate("hello", params)[0].prompt_logprobs or []
    answer = server.openai.completions.create(
        model=NAME, prompt="hello", max_tokens=0, echo=True, logprobs=0
    )
    [choice] = answer.choices
    assert choice.text == "hello"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["<bos>", *"hello"]
    assert choice.logprobs.text_offset == [0, 0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs == pytest.approx(
        [None if entry is None else entry.logprob for entry in scored], abs=1e-5
    )


def test_a_conversation_is_answered_in_the_models_template(server: Server, llm: LLM) -> None:
    ids = llm.encode_chat(MESSAGES)
    assert llm.model.tokenizer.decode(ids) == TEMPLATE
    [expected] = llm.generate(ids, SamplingParams(max_tokens=8, logprobs=2))
    answer = server.openai.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    scored = choice.logprobs.content or []
    assert [e.logprob for e in scored] == pytest.approx(
        [e.logprob for e in expected.logprobs or []], abs=1e-5
    )
    assert all(len(entry.top_logprobs) == 2 for entry in scored)
    shown = b"".join(bytes(entry.bytes or []) for entry in scored)
    assert shown.decode(errors="replace").startswith(expected.text[:3])


def test_a_streamed_conversation_adds_up_and_ends_with_its_usage(server: Server) -> None:
    client = server.openai.chat.completions
    fields = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "n": 2, "seed": 1}
    whole = client.create(**fields)
    texts = {0: "", 1: ""}
    reasons: dict[int, list[str | None]] = {0: [], 1: []}
    usages = []
    events = list(client.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert {event.id for event in events} == {events[0].id}
    assert events[0].choices[0].delta.role == "assistant"
    for event in events:
        usages.append(event.usage)
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index].append(choice.finish_reason)
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    for index, choice in enumerate(whole.choices):
        assert reasons[index][-1] == choice.finish_reason
        assert set(reasons[index][:-1]) == {None}
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1] is not None
    assert usages[-1].total_tokens == whole.usage.total_tokens


def test_stop_seed_and_bias_reach_the_engine(server: Server, llm: LLM) -> None:
    _, a, b = llm.encode("ab")
    bias = {str(a): 100, str(b): 100}
    fields = {"model": NAME, "prompt": "x", "logit_bias": bias, "max_tokens": 30, "top_p": 0.99}
    first = server.openai.completions.create(**fields, seed=7).choices[0].text
    assert set(first) <= {"a", "b"}
    assert server.openai.completions.create(**fields, seed=7).choices[0].text == first
    stopped = server.openai.completions.create(**fields, seed=7, stop=["ba", "zz"]).choices[0]
    assert stopped.text == first.split("ba")[0]
    assert stopped.finish_reason == "stop"


def test_a_request_brings_its_plan(server: Server, llm: LLM) -> None:
    plan = "streamingllm(budget=32)"
    prompt = "abcdefgh" * 16
    [expected] = llm.generate(prompt, SamplingParams(max_tokens=6), plan)
    answer = server.openai.completions.create(
        model=NAME, prompt=prompt, max_tokens=6, temperature=0, extra_body={"kv_plan": plan}
    )
    assert answer.choices[0].text == expected.text
    assert answer.usage is not None
    extra = answer.usage.model_extra or {}
    assert extra["kv_bytes"] == expected.metrics.kv_bytes < extra["kv_bytes_dense"]


def test_embeddings_are_refused_in_words(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        server.openai.embeddings.create(model=NAME, input="hello")


def test_texts_and_conversations_are_tokenized(server: Server, llm: LLM) -> None:
    with server.http as client:
        text = client.post("/tokenize", json={"prompt": "hi"}).json()
        chat = client.post("/tokenize", json={"messages": MESSAGES}).json()
    assert text == {"tokens": llm.encode("hi"), "count": 3, "max_model_len": 512}
    assert chat["tokens"] == llm.encode_chat(MESSAGES)


def test_pages_are_free_when_all_is_answered(server: Server) -> None:
    server.wait_idle()
