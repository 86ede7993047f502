"""What every engine under measurement can be asked to do. Needs nothing but Python, for each engine
runs in the environment it is installed in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Contestant(Protocol):
    """An engine that holds one sequence at a time. Seconds are wall clock."""

    def prefill(self, prompt: Sequence[int]) -> float:
        """Forget the sequence before, compute a prompt and its first token; the seconds taken."""

    def decode(self, n_tokens: int) -> float:
        """Generate `n_tokens` more tokens of it, at most `ROOM` in all; the seconds per token."""

    @property
    def kv_bytes(self) -> int:
        """Bytes that the sequence's keys and values take now."""


ROOM = 512
"""Tokens that can follow a prompt, where an engine wants to know before."""


@dataclass(frozen=True)
class Throughput:
    """How fast several requests were answered, tokens per second over all of them.

    Attributes:
        tokens_per_s: tokens generated, over the whole time, prompts included.
        decode_tokens_per_s: the same while no prompt was being computed and none had ended.
        overhead: the share of that decoding that was spent outside the model's forward, where the
            engine tells.
    """

    tokens_per_s: float
    decode_tokens_per_s: float
    overhead: float | None = None


class Crowd(Protocol):
    """An engine, or a way of using one, that answers several requests."""

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """Generate `n_tokens` tokens, at least 2, after each of the prompts."""


class OneByOne:
    """A contestant that answers several requests one after the other.

    Args:
        contestant: who answers.
    """

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """As `Crowd.answer`."""
        start = time.perf_counter()
        per_token_s = []
        for prompt in prompts:
            self._contestant.prefill(prompt)
            per_token_s.append(self._contestant.decode(n_tokens - 1))
        took = time.perf_counter() - start
        return Throughput(
            tokens_per_s=len(prompts) * n_tokens / took,
            decode_tokens_per_s=len(prompts) / sum(per_token_s),
        )
