"""Results, summed up: means per cell, costs per plan, fronts, and scores by depth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

from tamis.bench.results import Answer, Reading, Timing
from tamis.bench.tasks.scenes import TASKS

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

ONE_FACT = ("single", "multi_key", "key_value")
"""Tasks whose answer lies at one place, which is what depth is about."""


@dataclass(frozen=True)
class Quality:
    """Answers of one group. `score` and `exact` are means over `count` answers, or None without
    any; `failed` requests are in neither."""

    score: float | None
    exact: float | None
    count: int
    failed: int


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Memory:
    """Mean bytes of a request's KV pages: at its peak, at its end, and of exact attention."""

    peak: float
    end: float
    dense: float

    @property
    def share(self) -> float:
        """The peak against exact attention's."""
        return self.peak / self.dense

    @property
    def kept(self) -> float:
        """What is held at the end, against exact attention."""
        return self.end / self.dense


@dataclass(frozen=True)
class Perplexity:
    """Of `tokens` scored tokens in `windows` windows together, each token counting the same; None
    without any. `failed` windows are in none of the numbers."""

    value: float | None
    tokens: int
    windows: int
    failed: int
    memory: Memory | None


@dataclass(frozen=True)
class Speed:
    """Of one plan at one length, over the rounds; ratios are to the baseline of each round."""

    ttft_s: Spread
    tpot_s: Spread
    ttft_ratio: Spread
    tpot_ratio: Spread
    memory: Memory
    rounds: int


class Summary:
    """All that a table or a figure needs.

    Attributes:
        plans: those in `first`, then the others as they first appear. `tasks`: our own in their
            order, then others by name. `lengths`: of documents, rising; None, for published
            prompts, comes last. `read_lengths`: of windows that perplexity was measured on.
            `timed_lengths`: where speed was measured.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        timings: Sequence[Timing],
        readings: Sequence[Reading] = (),
        first: Sequence[str] = (),
    ) -> None:
        # What failed and was repeated with success is in its file twice; the last one counts.
        self.answers = list({answer.key: answer for answer in answers}.values())
        self.readings = list({reading.key: reading for reading in readings}.values())
        self.timings = list(timings)
        rows: list[Answer | Reading | Timing] = [*self.answers, *self.readings, *self.timings]
        found = dict.fromkeys(row.plan for row in rows)
        self.plans = [plan for plan in dict.fromkeys([*first, *found]) if plan in found]
        tasks = {answer.task for answer in self.answers}
        self.tasks = [*(task for task in TASKS if task in tasks), *sorted(tasks - TASKS.keys())]
        self.lengths = sorted(
            {answer.length for answer in self.answers},
            key=lambda length: float("inf") if length is None else length,
        )
        self.read_lengths = sorted({reading.length for reading in self.readings})
        self.timed_lengths = sorted({timing.length for timing in self.timings})
        self._cells = _grouped(self.answers, lambda a: (a.plan, a.task, a.length))
        self._requests = _grouped(self.answers, lambda a: (a.plan, a.length))
        self._read = _grouped(self.readings, lambda r: (r.plan, r.length))
        self._timed = _grouped(self.timings, lambda t: (t.plan, t.length))

    def cell(self, plan: str, task: str, length: int | None) -> Quality:
        """Quality of one plan on one task at one length."""
        return quality(self._cells.get((plan, task, length), ()))

    def overall(self, plan: str, length: int | None) -> float | None:
        """Mean score over tasks, each counting the same; None without any answer."""
        scores = [self.cell(plan, task, length).score for task in self.tasks]
        found = [score for score in scores if score is not None]
        return fmean(found) if found else None

    def memory(self, plan: str, length: int | None) -> Memory | None:
        """KV bytes of the requests that were answered at a length."""
        return _memory(self._requests.get((plan, length), ()))

    def perplexity(self, plan: str, length: int | None) -> Perplexity | None:
        """Of held-out text in windows of a length; None where it was not measured."""
        rows = [] if length is None else self._read.get((plan, length), [])
        if not rows:
            return None
        scored = [(row.nats, row.scored_tokens) for row in rows if row.nats is not None]
        tokens = sum(count for _, count in scored)
        nats = math.fsum(nats for nats, _ in scored)
        return Perplexity(
            math.exp(nats / tokens) if tokens else None,
            tokens,
            len(scored),
            len(rows) - len(scored),
            _memory(rows),
        )

    def speed(self, plan: str, length: int | None) -> Speed | None:
        """Times at a length; None where they were not measured."""
        rows = [] if length is None else self._timed.get((plan, length), [])
        if not rows:
            return None
        return Speed(
            spread([row.ttft_s for row in rows]),
            spread([row.tpot_s for row in rows]),
            spread([row.ttft_s / row.dense_ttft_s for row in rows]),
            spread([row.tpot_s / row.dense_tpot_s for row in rows]),
            _mean_memory(rows),
            len(rows),
        )

    def timeline(self, plan: str, length: int) -> Timing | None:
        """The round whose time to the first token is the median (the lower of two)."""
        rows = sorted(self._timed.get((plan, length), ()), key=lambda row: row.ttft_s)
        return rows[(len(rows) - 1) // 2] if rows else None

    def by_depth(self, plan: str, bins: int) -> dict[tuple[int | None, int], Quality]:
        """Quality on tasks of one fact, by length and part of the document the fact lies in."""
        rows = [
            a for a in self.answers if a.plan == plan and a.task in ONE_FACT and a.depth is not None
        ]
        groups = _grouped(rows, lambda a: (a.length, min(bins - 1, int((a.depth or 0) * bins))))
        return {place: quality(group) for place, group in groups.items()}

    def by_style(self, plan: str) -> dict[tuple[str, str], Quality]:
        """Quality by kind of value and phrasing of the question, over tasks and lengths."""
        rows = [a for a in self.answers if a.plan == plan and a.kind and a.phrasing]
        groups = _grouped(rows, lambda a: (a.kind or "", a.phrasing or ""))
        return {style: quality(group) for style, group in groups.items()}

    @property
    def failed(self) -> int:
        """Requests that failed."""
        requests: list[Answer | Reading] = [*self.answers, *self.readings]
        return sum(request.error is not None for request in requests)


def quality(answers: Iterable[Answer]) -> Quality:
    """Means over answers."""
    rows = list(answers)
    scores = [row.score for row in rows if row.score is not None]
    exact = [row.exact for row in rows if row.exact is not None]
    return Quality(
        fmean(scores) if scores else None,
        fmean(exact) if exact else None,
        len(scores),
        len(rows) - len(scores),
    )


def _memory(requests: Iterable[Answer | Reading]) -> Memory | None:
    rows = [row for row in requests if row.error is None]
    return _mean_memory(rows) if rows else None


def _mean_memory(rows: Sequence[Answer | Reading | Timing]) -> Memory:
    return Memory(
        fmean(row.kv_bytes_peak for row in rows),
        fmean(row.kv_bytes for row in rows),
        fmean(row.kv_bytes_dense for row in rows),
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and range of at least one value."""
    return Spread(median(values), min(values), max(values))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (cost, quality) no other point beats: none is as good in both and better
    in one."""
    return [
        not any(
            cost <= mine and quality >= good and (cost < mine or quality > good)
            for cost, quality in points
        )
        for mine, good in points
    ]


def _grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)
