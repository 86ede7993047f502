"""How many prompt tokens join a step in which other sequences decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from tamis.errors import ConfigError

_MEMORY = 0.8
"""Weight of the past in a moving average: a change is followed within about ten steps."""
_MOST = 2.0
"""What a step may seem to have cost at the most, of the average: one that the system has kept
waiting says nothing of those to come, and decides neither pace nor foreseen waits."""
_LEAST = 4
"""Prompt tokens of a step at the least: a prompt always goes on."""


@dataclass
class Costs:
    """What steps have cost lately, as moving averages over the steps that told.

    Attributes:
        decode_s: seconds of a step that only decodes; None before the first.
        prompt_token_s: seconds that a token of a prompt adds to a step; None before the first. It
            grows with the prompt's depth, and is followed.
    """

    decode_s: float | None = None
    prompt_token_s: float | None = None

    def observe(self, seconds: float, n_decoding: int, n_prompt: int) -> None:
        """Learn from a step of `n_decoding` decoding sequences and `n_prompt` prompt tokens."""
        if not n_prompt:
            self.decode_s = _averaged(self.decode_s, seconds)
            return
        own = seconds - (self.decode_s or 0.0) if n_decoding else seconds
        # A noisy step may seem to have cost less than nothing.
        self.prompt_token_s = _averaged(self.prompt_token_s, max(own, 0.1 * seconds) / n_prompt)


class Pace(ABC):
    """A limit on the prompt tokens of a step."""

    @abstractmethod
    def prompt_tokens(self, costs: Costs, n_decoding: int, budget: int) -> int:
        """Prompt tokens that may join a step, 1 .. budget.

        Args:
            costs: of the steps so far.
            n_decoding: sequences that decode in the step.
            budget: tokens of the step that they leave, at least 1.
        """


class Full(Pace):
    """As many as fit the token budget: the most tokens per second."""

    def prompt_tokens(self, costs: Costs, n_decoding: int, budget: int) -> int:
        return budget


class Steady(Pace):
    """As many as keep the time between a decoding sequence's tokens at `slowdown` times what it is
    without prompts: chunked prefill that piggybacks on decodes (Sarathi, arXiv:2308.16369, and
    Sarathi-Serve, arXiv:2403.02310, whose token budget is found here from measured costs).

    Raises:
        ConfigError: `slowdown` is not more than 1.
    """

    def __init__(self, slowdown: float = 2.0) -> None:
        if not slowdown > 1:
            raise ConfigError(f"slowdown must be more than 1, got {slowdown!r}")
        self.slowdown = slowdown

    def prompt_tokens(self, costs: Costs, n_decoding: int, budget: int) -> int:
        if not n_decoding:
            return budget
        if costs.decode_s is None or costs.prompt_token_s is None:
            return min(budget, _LEAST)
        spare = (self.slowdown - 1) * costs.decode_s
        return min(budget, max(_LEAST, int(spare / costs.prompt_token_s)))


def _averaged(before: float | None, now: float) -> float:
    if before is None:
        return now
    return _MEMORY * before + (1 - _MEMORY) * min(now, _MOST * before)
