"""Who goes first: the order in which sequences run, are admitted, and give way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from tamis.errors import ConfigError

if TYPE_CHECKING:
    from tamis.engine.sequence import Sequence

Key = tuple[float, ...]


class Order(ABC):
    """An order among sequences. The first runs and is admitted first; when pages are short, the
    last gives its own up."""

    @abstractmethod
    def key(self, sequence: Sequence) -> Key:
        """Where a sequence stands, smaller first; it may change from step to step, and no two
        sequences have the same."""

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether a waiting sequence that finds no room may take the pages of a running one."""
        return False

    def tokens_ahead(self, sequence: Sequence, left: Mapping[Sequence, int]) -> int:
        """Tokens that others get before a queued sequence has its first.

        Args:
            left: of every sequence, its own among them, the tokens that it has yet to compute.
        """
        key = self.key(sequence)
        return sum(n for other, n in left.items() if self.key(other) < key)

    def arrived(self, sequence: Sequence, others: Collection[Sequence]) -> None:
        """Note that a request has come in while `others` wait or run."""
        return

    def served(self, sequence: Sequence, n_tokens: int) -> None:
        """Note that `n_tokens` of a sequence were computed."""
        return


class FirstCome(Order):
    """First come, first served; the newest gives way."""

    def key(self, sequence: Sequence) -> Key:
        return _arrival(sequence)


class ByPriority(Order):
    """The smaller `priority` first, then first come, first served. A waiting request takes the
    pages of running ones with a larger number."""

    def key(self, sequence: Sequence) -> Key:
        return (sequence.request.priority, *_arrival(sequence))

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        return waiting.request.priority < running.request.priority


class FairShare(Order):
    """The user who has been served least goes first (the virtual token counter of "Fairness in
    Serving Large Language Models", arXiv:2401.00588, algorithm 2).

    A user's counter grows by 1 for every prompt token that is computed and by `output_weight` for
    every generated one. A user who comes back after a pause starts at the least counter of those
    who are there, so that nobody saves service up.

    Args:
        output_weight: prompt tokens that a generated token counts as.
        quantum: by how much a running user's counter must exceed a waiting one's before the former
            gives way to the latter; each such change costs a preemption.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, output_weight: float = 2.0, quantum: float = 4096.0) -> None:
        if not output_weight > 0 or not quantum > 0:
            raise ConfigError(
                "output_weight and quantum of a fair share must be more than 0, got "
                f"{output_weight!r} and {quantum!r}"
            )
        self.output_weight = output_weight
        self.quantum = quantum
        self._served: defaultdict[str, float] = defaultdict(float)

    def key(self, sequence: Sequence) -> Key:
        return (self._served[sequence.request.user], *_arrival(sequence))

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        least = self._served[waiting.request.user] + self.quantum
        return self._served[running.request.user] > least

    def tokens_ahead(self, sequence: Sequence, left: Mapping[Sequence, int]) -> int:
        """All of what its own user sent before; of others as much as its user gets meanwhile."""
        before = 0
        of_others: defaultdict[str, int] = defaultdict(int)
        for other, n in left.items():
            if other.request.user != sequence.request.user:
                of_others[other.request.user] += n
            elif _arrival(other) < _arrival(sequence):
                before += n
        own = before + left[sequence]
        return before + sum(min(n, own) for n in of_others.values())

    def arrived(self, sequence: Sequence, others: Collection[Sequence]) -> None:
        user = sequence.request.user
        there = {other.request.user for other in others}
        if user not in there:
            least = min((self._served[other] for other in there), default=0.0)
            self._served[user] = max(self._served[user], least)
        if not there:  # nobody is compared with those who have left
            self._served = defaultdict(float, {user: 0.0})

    def served(self, sequence: Sequence, n_tokens: int) -> None:
        weight = 1.0 if sequence.in_prompt else self.output_weight
        self._served[sequence.request.user] += weight * n_tokens


def _arrival(sequence: Sequence) -> tuple[int, int]:
    return (sequence.request.arrival, sequence.index)
