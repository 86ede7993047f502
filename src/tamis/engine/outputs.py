"""What the engine hands back: increments while a request runs, its output at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a sampled token and of the most likely ones at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Increment:
    """What one step added to one completion of a request.

    Attributes:
        request_id: the request.
        index: which of its `n` completions.
        text: new text; the concatenation over increments is the completion's text.
        token_ids: new tokens.
        logprobs: one entry per new token where the request asked for them.
        finish_reason: set on the last increment of the completion.
        stop_reason: the stop string or stop token id that ended it, where one did.
        error: what went wrong, with finish_reason "error".
        output: the whole request, on the last increment of its last completion.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    output: RequestOutput | None = None


@dataclass(frozen=True)
class Completion:
    """One finished continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """What a request cost. Times in seconds, sizes in bytes.

    Attributes:
        queue_s: from arrival until its first tokens were computed.
        ttft_s: from arrival until its first token was sampled (None if it never was).
        tpot_s: mean time between its tokens after the first (None with fewer than two).
        total_s: from arrival until it ended.
        kv_bytes: its pages when it ended and, under plans whose tokens stop on their way through
            the layers, the hidden states with which they wait to go on; what its completions share
            is counted once.
        kv_bytes_peak: the most these ever took.
        kv_bytes_dense: what exact attention would have needed for the same tokens.
        preemptions: how often it had to give its pages up.
        cached_tokens: tokens of the prompt whose pages were there already.
    """

    prompt_tokens: int
    output_tokens: int
    queue_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_dense: int
    preemptions: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """A finished request; `text`, `token_ids`, ... are those of its first completion.

    `prompt_logprobs`, where they were asked for, has an entry per prompt token; None for the
    first, which no token precedes.
    """

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion] = field(repr=False)
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprob | None] | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.completions[0].logprobs

    @property
    def error(self) -> str | None:
        return self.completions[0].error
