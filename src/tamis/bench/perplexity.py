"""Held-out perplexity: how well a model foretells the second half of windows of real text.

The first half of a window is a prompt, there to be looked back at. The second is then forced upon
the model as its output, and scored by what it says of each of its tokens before it is given. So all
that a plan does shows: in prefill, to the cache at the prompt's end, and step by step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tamis.bench.completed import Order, as_completed
from tamis.bench.results import Reading, ResultFile
from tamis.engine.outputs import RequestOutput
from tamis.errors import ConfigError
from tamis.llm import LLM
from tamis.plan import Plan
from tamis.sampling import SamplingParams

PERPLEXITY = "perplexity"
"""Its name among the tasks."""


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text, after the token that begins every sequence, if there is one.

    Attributes:
        sample: which window of its length.
        token_ids: as many as its length says.
    """

    sample: int
    token_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def prompt(self) -> list[int]:
        """The first half, rounded down."""
        return list(self.token_ids[: self.length // 2])

    @property
    def params(self) -> SamplingParams:
        """That the second half follows, and is scored."""
        return SamplingParams(forced=self.token_ids[self.length // 2 :], logprobs=0)

    @cached_property
    def digest(self) -> str:
        """A short hash of the tokens."""
        return hashlib.sha256(repr(self.token_ids).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ReadingWork:
    """What is to be read.

    Attributes:
        windows: all of them. `plans`: by the name they have in results.
        done: keys of the readings that are already there, each with the digest of its window.
    """

    windows: Sequence[Window]
    plans: dict[str, Plan]
    done: frozenset[tuple[object, ...]]

    def __iter__(self) -> Iterator[tuple[str, Window]]:
        """The pairs of plan and window left."""
        for window in self.windows:
            for plan in self.plans:
                if (plan, window.length, window.sample, window.digest) not in self.done:
                    yield plan, window

    @property
    def tokens(self) -> int:
        """Tokens of all windows left, once per plan."""
        return sum(window.length for _, window in self)

    def check(self, llm: LLM) -> None:
        """Find out before a long run that the longest window cannot be run; nothing is computed.

        Raises:
            KVMemoryError: it does not fit.
        """
        longest = max((window for _, window in self), key=lambda w: w.length, default=None)
        if longest is not None:
            for plan in self.plans.values():
                llm.engine.abort(llm.engine.add_request(longest.prompt, longest.params, plan))


def cut_windows(
    llm: LLM, text: str, lengths: Iterable[int], count: int, seed: int = 0
) -> list[Window]:
    """Windows of a text, spread over it; those of one length do not overlap.

    Args:
        lengths: tokens of a window, the one that begins a sequence included.
        count: windows of each length; fewer where the text is too short for so many.
        seed: decides where in its part of the text each window lies.

    Raises:
        ConfigError: a length is below 2, beyond the model's context, or longer than the text.
        RequestError: the model has no tokenizer.
    """
    wanted = sorted(set(lengths))
    if not wanted:
        return []
    limit = llm.model.max_length
    for length in wanted:
        if not 2 <= length <= limit:
            raise ConfigError(
                f"task {PERPLEXITY!r} takes lengths from 2 to {limit:,} tokens with this model's "
                f"context, not {length:,}"
            )
    tokens = llm.encode(text)
    assert llm.model.tokenizer is not None
    begins = tokens[0] == llm.model.tokenizer.bos_token_id
    first, tokens = (tokens[:1], tokens[1:]) if begins else ([], tokens)
    return [
        window
        for length in wanted
        for window in _spread(first, tokens, length, count, np.random.default_rng([seed, length]))
    ]


def _spread(
    first: list[int], tokens: list[int], length: int, count: int, rng: np.random.Generator
) -> Iterator[Window]:
    """Windows at a random place in each of equal parts of the tokens."""
    size = length - len(first)
    if len(tokens) < size:
        raise ConfigError(
            f"task {PERPLEXITY!r} at length {length:,} needs a longer haystack than "
            f"{len(tokens):,} tokens; give one, or leave the task out"
        )
    parts = min(count, len(tokens) // size)
    part = len(tokens) // parts
    for sample in range(parts):
        start = sample * part + int(rng.integers(part - size + 1))
        yield Window(sample, (*first, *tokens[start : start + size]))


def open_readings(
    windows: Sequence[Window], plans: dict[str, Plan], readings: Iterable[Reading]
) -> ReadingWork:
    """The work left where some readings are there; what failed or was another text is read."""
    done = frozenset((*r.key, r.prompt_digest) for r in readings if r.error is None)
    return ReadingWork(windows, plans, done)


def run_readings(
    llm: LLM, work: ReadingWork, file: ResultFile[Reading], advance: Callable[[int], None]
) -> None:
    """Read all that is left as one batch, appending each reading to `file` the moment it ends.

    Args:
        advance: called with the tokens of a window that was read.

    Raises:
        RequestError, KVMemoryError: a window cannot be run.
    """
    orders = (
        Order((name, window), window.prompt, window.params, work.plans[name])
        for name, window in work
    )
    with closing(as_completed(llm, orders)) as completed:  # frees the pages of a run cut short
        for (plan, window), output in completed:
            file.append(_reading(plan, window, output))
            advance(window.length)


def _reading(plan: str, window: Window, output: RequestOutput) -> Reading:
    scored = len(window.params.forced)
    failed = output.finish_reason == "error"
    nats = None
    if not failed:
        assert output.logprobs is not None
        nats = -math.fsum(said.logprob for said in output.logprobs)
    return Reading(
        plan=plan,
        length=window.length,
        sample=window.sample,
        prompt_digest=window.digest,
        scored_tokens=scored,
        nats=nats,
        perplexity=None if nats is None else math.exp(nats / scored),
        kv_bytes=output.metrics.kv_bytes,
        kv_bytes_peak=output.metrics.kv_bytes_peak,
        kv_bytes_dense=output.metrics.kv_bytes_dense,
        error=output.error if failed else None,
    )
