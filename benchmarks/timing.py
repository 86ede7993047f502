"""Samples of interleaved runs, and what is said of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spread:
    """The median of some samples, with the least and the greatest."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """What at least one sample says."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


def in_turns(runs: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """The results of each of `runs`, run once per round, A B A B ..., so that what else the
    machine does meets all of them alike."""
    results: dict[str, list[Result]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return results
