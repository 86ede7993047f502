"""What both endpoints have in common when they write what the engine gives."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel

from tamis.engine.outputs import FinishReason as EngineFinish
from tamis.engine.outputs import Increment, RequestOutput
from tamis.plan import Plan
from tamis.sampling import SamplingParams
from tamis.server.protocol import FinishReason, PromptTokensDetails, Usage


@dataclass(frozen=True)
class Job:
    """What a request asks of the engine.

    Attributes:
        prompts: token ids.
        params: of all prompts.
        plan: of all prompts.
        priority, user: what the engine's order may go by.
        context: the engine's name of the context that they go on from, or of several.
        keep_as: the engine's name of the context that the one prompt becomes, instead of being
            answered.
    """

    prompts: Sequence[list[int]]
    params: SamplingParams
    plan: Plan
    priority: int = 0
    user: str = ""
    context: str | tuple[str, ...] | None = None
    keep_as: str | None = None


@dataclass(frozen=True)
class Head:
    """What every object of one answer carries.

    Attributes:
        id: of the answer; `created` is its time in seconds since 1970.
        model: the name that the client used.
    """

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def new(cls, kind: str, model: str) -> Head:
        return cls(f"{kind}-{uuid.uuid4().hex}", model)


class Writer(Protocol):
    """Writes the answer of one request; outputs and increments come with the prompt's number."""

    def whole(self, outputs: Sequence[RequestOutput]) -> BaseModel:
        """The answer that is not streamed."""

    def opening(self) -> Iterable[BaseModel]:
        """The events before anything was generated."""

    def events(self, prompt: int, increment: Increment) -> Iterable[BaseModel]:
        """The events of an increment."""

    def closing(self, outputs: Sequence[RequestOutput]) -> Iterable[BaseModel]:
        """The events after everything was generated."""


def finish(reason: EngineFinish | None) -> FinishReason:
    """The finish_reason of a completion that ended well."""
    return "length" if reason == "length" else "stop"


def usage(outputs: Iterable[RequestOutput]) -> Usage:
    """What the prompts of a request took together."""
    metrics = [output.metrics for output in outputs]
    prompt = sum(m.prompt_tokens for m in metrics)
    generated = sum(m.output_tokens for m in metrics)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(m.cached_tokens for m in metrics)
        ),
        kv_bytes=sum(m.kv_bytes for m in metrics),
        kv_bytes_peak=sum(m.kv_bytes_peak for m in metrics),
        kv_bytes_dense=sum(m.kv_bytes_dense for m in metrics),
    )
