"""The two parts of the run, times and answers: each goes on where it stopped, past what fails."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from methods_plans import DENSE, Setting
from methods_timing import SHORT, Bench, Case
from random_llama import LlamaShape
from tamis import LLM
from tamis.bench.exercise import Exercise
from tamis.bench.results import Answer, ResultFile, Timing
from tamis.bench.runner import Prompting, Work, open_work, run_answers
from tamis.bench.text import length_text, percent, ratio, seconds
from tamis.plan import Plan
from tamis.shipped import REFERENCE

Failures = dict[str, str]
"""Plans that could not be measured, and why."""


@dataclass(frozen=True)
class Settings:
    """What is measured; by default at the sizes that the goals are meant for.

    Attributes:
        shape: the model that is timed.
        cases: prompts that are timed, ascending.
        short: tokens of the short prompt that is decoded beside all others.
        model: whose answers are judged, on `tasks` of `judged_lengths` with `samples` each.
        threads: torch's threads.
        goals: whether goals are judged.
    """

    shape: LlamaShape = field(default_factory=LlamaShape)
    cases: tuple[Case, ...] = (
        Case(8192, rounds=3, new_tokens=65),
        Case(32_768, rounds=1, new_tokens=33, exact_every=8),
    )
    short: int = SHORT
    model: str = REFERENCE
    tasks: tuple[str, ...] = ("single", "multi_key", "key_value", "variables")
    judged_lengths: tuple[int, ...] = (4096, 8192)
    samples: int = 6
    threads: int = 2
    goals: bool = True

    def quick(self) -> Settings:
        """The same at sizes that take a second per plan and prove nothing."""
        return replace(
            self,
            cases=(Case(512, 1, 17), Case(2048, 1, 17, exact_every=8)),
            tasks=("single", "multi_key"),
            judged_lengths=(1024,),
            samples=2,
            goals=False,
        )

    def rounds(self, settings: Iterable[Setting]) -> Iterator[tuple[str, Case, int]]:
        """Plan, case and repeat of everything to be timed, all of it once before any twice."""
        plans = [DENSE, *(plan for setting in settings for plan in setting.timed)]
        for repeat in range(max(case.rounds for case in self.cases)):
            for case in self.cases:
                for plan in plans if repeat < case.rounds else ():
                    yield plan, case, repeat


class Remaining:
    """How long a run will still take, from how long its work took so far.

    Args:
        total: all that is to be done, in any unit that grows with time.
        clock: tells the seconds.
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._total = total
        self._clock = clock
        self._start = clock()
        self._done = 0.0

    def done(self, work: float) -> None:
        """So much more of it is done, or will never be."""
        self._done += work

    def __str__(self) -> str:
        took = self._clock() - self._start
        left = took * (self._total - self._done) / self._done if self._done else 0.0
        return f"{left:.0f} s left" if left < 100 else f"{left / 60:.0f} min left"


def time_plans(
    wanted: Settings, settings: Sequence[Setting], file: ResultFile[Timing], console: Console
) -> Failures:
    """Time what `file` does not hold yet; `console` is told every round."""
    done = {row.key for row in file.rows}
    left = [
        (plan, case, repeat)
        for plan, case, repeat in wanted.rounds(settings)
        if (plan, case.length, repeat) not in done
    ]
    failures: Failures = {}
    if not left:
        return failures

    def work(case: Case) -> float:
        return wanted.shape.prefill_flops(case.length) * (1 + 1 / case.exact_every)

    remaining = Remaining(sum(work(case) for _, case, _ in left))
    with tempfile.TemporaryDirectory(prefix="tamis-bench-") as scratch:
        bench = Bench(wanted.shape, Path(scratch), wanted.short)
        warm: set[str] = set()
        for number, (plan, case, repeat) in enumerate(left, start=1):
            remaining.done(work(case))
            if plan in failures:
                continue
            where = f"times {number}/{len(left)}: {plan}, {length_text(case.length)}"
            with _surviving(plan, where, failures, console):
                if plan not in warm:
                    bench.warm_up(plan)
                    warm.add(plan)
                row = bench.compare(plan, case, repeat)
                file.append(row)
                _say(
                    console,
                    f"{where}: first token {seconds(row.ttft_s)}, "
                    f"{ratio(row.ttft_s / row.dense_ttft_s)}; each {seconds(row.tpot_s)}, "
                    f"{ratio(row.tpot_s / row.dense_tpot_s)}; "
                    f"KV {ratio(row.kv_bytes / row.kv_bytes_dense)}; {remaining}",
                )
    return failures


def work_left(
    exercises: Sequence[Exercise], settings: Iterable[Setting], answers: Sequence[Answer]
) -> dict[str, Work]:
    """By plan, what is not answered yet, exact attention first."""
    plans = [DENSE, *(plan for setting in settings for plan in setting.judged)]
    works = {plan: open_work(exercises, {plan: Plan.parse(plan)}, answers) for plan in plans}
    return {plan: work for plan, work in works.items() if work.characters}


def judge_plans(
    llm: LLM, left: Mapping[str, Work], file: ResultFile[Answer], console: Console
) -> Failures:
    """Answer what is left, plan by plan; `console` is told every plan."""
    failures: Failures = {}
    remaining = Remaining(sum(work.characters for work in left.values()))
    for number, (plan, work) in enumerate(left.items(), start=1):
        where = f"answers {number}/{len(left)}: {plan}"
        with _surviving(plan, where, failures, console):
            run_answers(llm, work, Prompting(), file, lambda characters: None)
        remaining.done(work.characters)
        rows = {row.key: row for row in file.rows if row.plan == plan}.values()
        errors = [row.error for row in rows if row.error is not None]
        scores = [row.score for row in rows if row.score is not None]
        if errors:
            failures[plan] = errors[-1]
            _say(console, f"{where}: {len(errors)} FAILED: {errors[-1]}")
        if scores:
            mean = percent(sum(scores) / len(scores))
            _say(console, f"{where}: score {mean} of {len(scores)}; {remaining}")
    return failures


@contextmanager
def _surviving(plan: str, where: str, failures: Failures, console: Console) -> Iterator[None]:
    """Whatever a method raises ends its own measurement and not those of the others."""
    try:
        yield
    except Exception as error:
        failures[plan] = f"{type(error).__name__}: {error}"
        _say(console, f"{where}: FAILED: {failures[plan]}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
