"""`/v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tamis.engine.outputs import Increment, RequestOutput
from tamis.engine.outputs import TokenLogprob as EngineLogprob
from tamis.server.answer import Head, finish, usage
from tamis.server.errors import ApiError
from tamis.server.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Delta,
    Message,
)
from tamis.server.tokens import TokenTexts


def conversation(messages: Iterable[Message]) -> list[dict[str, str]]:
    """The messages as a chat template takes them."""
    roles = {"developer": "system"}  # OpenAI's newer name for the same
    return [{"role": roles.get(m.role, m.role), "content": m.text} for m in messages]


def sampling(request: ChatRequest) -> dict[str, Any]:
    """The sampling parameters that this endpoint has in a form of its own.

    Raises:
        ApiError: they contradict each other.
    """
    most = [m for m in (request.max_completion_tokens, request.max_tokens) if m is not None]
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return {
        "max_tokens": most[0] if most else None,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }


class ChatWriter:
    """Writes an answer; see `Writer`."""

    def __init__(self, request: ChatRequest, head: Head, texts: TokenTexts) -> None:
        self._head = vars(head)
        self._texts = texts
        self._n = request.n or 1
        self._logprobs = bool(request.logprobs)
        options = request.stream_options
        self._usage = options is not None and options.include_usage

    def whole(self, outputs: Sequence[RequestOutput]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=completion.index,
                message=AnswerMessage(content=completion.text),
                logprobs=self._scored(completion.logprobs or ()),
                finish_reason=finish(completion.finish_reason),
            )
            for completion in outputs[0].completions
        ]
        return ChatCompletion(**self._head, choices=choices, usage=usage(outputs))

    def opening(self) -> Iterator[ChatChunk]:
        for index in range(self._n):
            yield self._chunk(index, Delta(role="assistant", content=""))

    def events(self, prompt: int, increment: Increment) -> Iterator[ChatChunk]:
        if increment.text or increment.logprobs:
            delta = Delta(content=increment.text)
            yield self._chunk(increment.index, delta, logprobs=self._scored(increment.logprobs))
        if increment.finish_reason is not None:
            reason = finish(increment.finish_reason)
            yield self._chunk(increment.index, Delta(), finish_reason=reason)

    def closing(self, outputs: Sequence[RequestOutput]) -> Iterator[ChatChunk]:
        if self._usage:
            yield ChatChunk(**self._head, choices=[], usage=usage(outputs))

    def _chunk(self, index: int, delta: Delta, **fields: Any) -> ChatChunk:
        return ChatChunk(
            **self._head, choices=[ChatChunkChoice(index=index, delta=delta, **fields)]
        )

    def _scored(self, logprobs: Sequence[EngineLogprob]) -> ChatLogprobs | None:
        return self._texts.chat(logprobs) if self._logprobs else None
