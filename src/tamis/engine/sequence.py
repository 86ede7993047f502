"""A request and its sequences: what the scheduler orders and the engine extends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto

from tamis.cache import Block, SequenceCache
from tamis.engine.context import Context, asks_at_once
from tamis.engine.lifecycle import Lifecycle
from tamis.engine.outputs import (
    Completion,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    TokenLogprob,
)
from tamis.engine.program import Program
from tamis.engine.sampler import SamplerState
from tamis.engine.text import TextStream
from tamis.engine.trace import Trace
from tamis.methods.views import DraftTree
from tamis.plan import Plan
from tamis.sampling import SamplingParams

_SCORED_CHUNK = 256
"""Tokens of one step of a prompt that is scored: 256 rows of 128k fp32 logits are 128 MiB."""


class Status(Enum):
    """Where a sequence stands; the scheduler alone changes it, but for FINISHED."""

    WAITING = auto()  # holds no pages
    RUNNING = auto()  # holds pages
    SWAPPED = auto()  # its pages lie in host memory
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """One continuation of a prompt.

    Attributes:
        tokens: prompt, then output. The last one's KV is computed by the next step.
        n_computed: tokens whose KV is in the cache; 0 again after preemption by recomputation.
        cache: its pages, None while it waits.
        life: its plan at work on them; None for exact attention.
        program: the passes that its tokens go through, where its plan has some.
        draft: tokens proposed for the next step.
        prefix: the last block of the prefix tree whose pages it shares.
    """

    request: Request
    index: int
    tokens: list[int]
    sampler: SamplerState
    text: TextStream | None
    cache: SequenceCache | None = None
    life: Lifecycle | None = None
    program: Program | None = None
    draft: DraftTree | None = None
    prefix: Block | None = None
    n_computed: int = 0
    status: Status = Status.WAITING
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def n_pending(self) -> int:
        """Tokens whose KV must still be computed; 1 for a sequence that decodes."""
        return len(self.tokens) - self.n_computed

    @property
    def in_prompt(self) -> bool:
        """Whether a part of the prompt is still to be computed."""
        return self.n_computed < self.n_prompt

    @property
    def n_ready(self) -> int:
        """Tokens that may run in one step at the most. What a plan has settled at the end of the
        prompt holds for all that follows, so no step goes across it, and generated tokens that
        are computed again (after preemption) run one by one, as they did; so does what follows a
        context, where the plan would act in between."""
        if self.program is not None:
            return self.program.remaining
        if self.life is None:
            return self.n_pending
        chunked = self.n_computed < self.life.prompt_tokens or asks_at_once(self.request.plan)
        return (
            self.n_prompt - self.n_computed
            if self.in_prompt and chunked
            else min(1, self.n_pending)
        )

    @property
    def in_question(self) -> bool:
        """Whether it is within what follows a context, all of which its plan takes as one."""
        at_once = self.request.context is not None and asks_at_once(self.request.plan)
        return at_once and self.in_prompt

    @property
    def settled(self) -> bool:
        """Whether its plan owes nothing."""
        return self.life is None or self.life.owed is None

    @property
    def layers(self) -> range | None:
        """The layers that the next step runs, None for all."""
        return None if self.program is None else self.program.current.layers

    @property
    def in_place(self) -> bool:
        """Whether the tokens of the next step lie in its cache already, to be written there."""
        return self.life is not None and self.life.fresh is not None

    @property
    def direct(self) -> bool:
        """Whether a single token reads all live pages and nothing else."""
        return self.program is None and (self.life is None or self.life.direct)

    @property
    def max_chunk(self) -> int:
        """The most tokens of one step: few, where each of them has logits of the vocabulary."""
        scored = self.request.to_score(self.n_computed, len(self.tokens))
        return _SCORED_CHUNK if scored else len(self.tokens)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    def completion(self) -> Completion:
        """What a finished sequence hands back."""
        assert self.finish_reason is not None
        return Completion(
            self.index,
            self.text.text if self.text is not None else "",
            self.output_ids,
            self.finish_reason,
            self.stop_reason,
            self.logprobs if self.request.params.logprobs is not None else None,
            self.error,
        )


@dataclass(eq=False)
class Request:
    """A prompt, what is asked of it, and its `params.n` sequences once the prompt is computed.

    Attributes:
        arrival: a number that grows from request to request.
        max_total: prompt and output tokens at which a sequence ends by "length".
        priority: the smaller goes first, where the order asks for it.
        user: whose share of the service it takes, where the order asks for it.
        n_reusable: tokens of the prompt that it could have begun with when it arrived.
        cached_tokens: tokens of the prompt that it began with.
        context: what it goes on from, which its prompt begins with.
        reused: contexts that its plan joins, one after the other, which its prompt begins with.
        makes: the context that its prompt is to become.
    """

    id: str
    arrival: int
    prompt_ids: list[int]
    params: SamplingParams
    plan: Plan
    max_total: int
    priority: int = 0
    user: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    arrived_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    trace: Trace | None = None
    kv_bytes: int = 0
    kv_bytes_peak: int = 0
    preemptions: int = 0
    n_reusable: int = 0
    cached_tokens: int = 0
    context: Context | None = None
    reused: tuple[Context, ...] = ()
    makes: Context | None = None

    @property
    def begins_with(self) -> Context | None:
        """The context whose pages its sequences begin with."""
        return self.reused[0] if self.reused else self.context

    @property
    def n_given(self) -> int:
        """Tokens of its prompt that contexts bring."""
        contexts = self.reused if self.context is None else (self.context,)
        return sum(len(context.tokens) for context in contexts)

    @property
    def finished(self) -> bool:
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    def to_score(self, begin: int, end: int) -> range:
        """Which of the positions begin..end - 1, when they are computed, tell the log-probability
        of a prompt token that is wanted and not yet known."""
        if self.params.prompt_logprobs is None:
            return range(0)
        known = len(self.prompt_logprobs)
        return range(max(begin, known - 1), min(end, len(self.prompt_ids) - 1))

    @property
    def n_longest(self) -> int:
        """Output tokens of its longest sequence."""
        return max(sequence.n_output for sequence in self.sequences)

    def output(self, kv_bytes_dense: int) -> RequestOutput:
        """What a finished request hands back; `kv_bytes_dense` is what exact attention needs."""
        first, last = self.first_token_s, self.last_token_s
        tpot = None
        if first is not None and last is not None and self.n_longest > 1:
            tpot = (last - first) / (self.n_longest - 1)
        metrics = RequestMetrics(
            prompt_tokens=len(self.prompt_ids),
            output_tokens=sum(sequence.n_output for sequence in self.sequences),
            queue_s=None if self.started_s is None else self.started_s - self.arrived_s,
            ttft_s=None if first is None else first - self.arrived_s,
            tpot_s=tpot,
            total_s=time.perf_counter() - self.arrived_s,
            kv_bytes=self.kv_bytes,
            kv_bytes_peak=self.kv_bytes_peak,
            kv_bytes_dense=kv_bytes_dense,
            preemptions=self.preemptions,
            cached_tokens=self.cached_tokens,
        )
        completions = [sequence.completion() for sequence in self.sequences]
        scored = self.prompt_logprobs if self.params.prompt_logprobs is not None else None
        return RequestOutput(self.id, list(self.prompt_ids), completions, metrics, scored)
