"""`/v1/completions`: texts or token ids in, how they go on out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from tamis.engine.outputs import Completion as EngineCompletion
from tamis.engine.outputs import Increment, RequestOutput
from tamis.engine.outputs import TokenLogprob as EngineLogprob
from tamis.server.answer import Head, finish, usage
from tamis.server.errors import ApiError
from tamis.server.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from tamis.server.tokens import TokenTexts


def prompts(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts of a request, one or many."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return cast("list[str] | list[list[int]]", prompt)


def sampling(request: CompletionRequest) -> dict[str, Any]:
    """The sampling parameters that this endpoint has in a form of its own.

    Raises:
        ApiError: something is asked for that does not go together.
    """
    if request.best_of not in (None, request.n or 1):
        raise ApiError(400, "best_of must equal n: all completions are returned", param="best_of")
    if request.echo and request.stream:
        raise ApiError(400, "echo is not streamed; leave stream out", param="echo")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens is 0, which only makes sense with echo", param="max_tokens")
    return {
        # With nothing to generate, one token is, and left out of the answer.
        "max_tokens": request.max_tokens or (None if request.max_tokens is None else 1),
        "logprobs": request.logprobs,
        "prompt_logprobs": request.logprobs if request.echo else None,
    }


class CompletionWriter:
    """Writes an answer; see `Writer`.

    Args:
        texts_of_prompts: what is echoed.
    """

    def __init__(
        self,
        request: CompletionRequest,
        head: Head,
        texts: TokenTexts,
        texts_of_prompts: Sequence[str],
    ) -> None:
        self._head = vars(head)
        self._texts = texts
        self._prompts = texts_of_prompts
        self._n = request.n or 1
        self._echo = request.echo
        self._silent = request.max_tokens == 0
        self._logprobs = request.logprobs is not None
        self._offsets: dict[int, int] = {}
        options = request.stream_options
        self._usage = options is not None and options.include_usage

    def whole(self, outputs: Sequence[RequestOutput]) -> Completion:
        choices = [
            self._choice(prompt, output, completion)
            for prompt, output in enumerate(outputs)
            for completion in output.completions
        ]
        return Completion(**self._head, choices=choices, usage=usage(outputs))

    def opening(self) -> Iterator[Completion]:
        return iter(())

    def events(self, prompt: int, increment: Increment) -> Iterator[Completion]:
        index = prompt * self._n + increment.index
        if increment.text or increment.logprobs:
            logprobs = None
            if self._logprobs:
                offset = self._offsets.get(index, 0)
                logprobs = self._texts.completion(increment.logprobs, offset)
                self._offsets[index] = offset + len(increment.text)
            yield self._event(index, increment.text, logprobs=logprobs)
        if increment.finish_reason is not None:
            yield self._event(index, "", finish_reason=finish(increment.finish_reason))

    def closing(self, outputs: Sequence[RequestOutput]) -> Iterator[Completion]:
        if self._usage:
            yield Completion(**self._head, choices=[], usage=usage(outputs))

    def _event(self, index: int, text: str, **fields: Any) -> Completion:
        choice = CompletionChoice(index=index, text=text, **fields)
        return Completion(**self._head, choices=[choice])

    def _choice(
        self, prompt: int, output: RequestOutput, completion: EngineCompletion
    ) -> CompletionChoice:
        return CompletionChoice(
            index=prompt * self._n + completion.index,
            text=(self._prompts[prompt] if self._echo else "")
            + ("" if self._silent else completion.text),
            logprobs=self._scored(output, completion) if self._logprobs else None,
            finish_reason=finish(completion.finish_reason),
        )

    def _scored(self, output: RequestOutput, completion: EngineCompletion) -> CompletionLogprobs:
        generated = [] if self._silent else completion.logprobs or []
        if not self._echo:
            return self._texts.completion(generated)
        prompt: list[EngineLogprob] = [e for e in output.prompt_logprobs or () if e is not None]
        return self._texts.completion([*prompt, *generated], first=output.prompt_token_ids[0])
