"""Every method against exact attention: time, memory and quality.

    python benchmarks/methods.py                  # about an hour on two cores
    python benchmarks/methods.py --quick          # small sizes: whether it runs at all
    python benchmarks/methods.py --only snapkv    # one method, and exact attention

Time and memory are measured on the Llama of random weights of `benchmarks/engine.py`, in bf16: each
plan's prompt right beside that of exact attention, and then decode steps of both in turns. Quality
is measured on the reference model, on tasks whose answers are known. `methods_plans.py` says how
each method is set.

Every measurement is a line in --out the moment it is there, so that the same command goes on after
Ctrl-C. The summary goes to results/methods.json, from which `methods_page.py` writes
docs/methods.md.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from methods_plans import DENSE, SETTINGS, Setting
from methods_summary import goal_rows, quality_rows, timing_rows
from methods_timing import SHORT, Bench, Round
from random_llama import LlamaShape
from report import Row, table
from tamis import LLM, files
from tamis.bench.exercise import Exercise
from tamis.bench.record import Record
from tamis.bench.record import Settings as Conditions
from tamis.bench.results import Answer, ResultFile, Timing
from tamis.bench.runner import Prompting, open_work, run_answers
from tamis.bench.suites import generated
from tamis.bench.tasks.puzzle import KINDS, PHRASINGS
from tamis.bench.tasks.samples import Suite
from tamis.bench.text import length_text, ratio, seconds
from tamis.cli.bench_screen import progress
from tamis.cli.reporting import record_of
from tamis.cli.terminal import quiet_logs
from tamis.errors import ConfigError, TamisError
from tamis.plan import Plan
from tamis.shipped import REFERENCE

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods.json"
_OUT = HERE.parent / "out"
_FILE_WIDTH = 150
_KV_MEMORY = "2GiB"


@dataclass(frozen=True)
class Settings:
    """What is measured; by default at the sizes that the goals are meant for.

    Attributes:
        shape: the model that is timed.
        lengths: prompts that are timed, ascending, in tokens.
        once_from: from this length on, a plan is timed in one round only.
        repeat: rounds of shorter ones.
        new_tokens: tokens generated after each prompt.
        short: tokens of the short prompt that is decoded beside all others.
        model: whose answers are judged, on `tasks` of `judged_lengths` with `samples` each.
        threads: torch's threads.
        goals: whether goals are judged.
    """

    shape: LlamaShape = field(default_factory=LlamaShape)
    lengths: tuple[int, ...] = (8192, 32_768)
    once_from: int = 32_768
    repeat: int = 3
    new_tokens: int = 65
    short: int = SHORT
    model: str = REFERENCE
    tasks: tuple[str, ...] = ("single", "multi_key", "key_value", "variables")
    judged_lengths: tuple[int, ...] = (4096, 8192)
    samples: int = 10
    threads: int = 2
    goals: bool = True

    def quick(self) -> Settings:
        """The same at sizes that take seconds per plan and prove nothing."""
        return replace(
            self,
            lengths=(512, 2048),
            repeat=1,
            new_tokens=17,
            tasks=("single", "multi_key"),
            judged_lengths=(1024,),
            samples=2,
            goals=False,
        )

    def rounds(self, settings: Iterable[Setting]) -> Iterator[tuple[str, int, int]]:
        """Plan, length and repeat of everything to be timed, all methods once before any twice."""
        plans = [DENSE, *(plan for setting in settings for plan in setting.timed)]
        for length in self.lengths:
            for repeat in range(1 if length >= self.once_from else self.repeat):
                for plan in plans:
                    yield plan, length, repeat


Failures = dict[str, str]
"""Plans that could not be measured, and why."""


def time_plans(
    wanted: Settings, settings: Sequence[Setting], file: ResultFile[Timing], console: Console
) -> Failures:
    """Time what `file` does not hold yet; `console` is told every round."""
    done = {row.key for row in file.rows}
    left = [one for one in wanted.rounds(settings) if one not in done]
    failures: Failures = {}
    if not left:
        return failures
    with tempfile.TemporaryDirectory(prefix="tamis-bench-") as scratch:
        bench = Bench(wanted.shape, Path(scratch), wanted.new_tokens, wanted.short)
        warm: set[str] = set()
        for number, (plan, length, repeat) in enumerate(left, start=1):
            if plan in failures:
                continue
            start = time.perf_counter()
            where = f"[{number}/{len(left)}] {plan}, {length_text(length)}"
            try:
                if plan not in warm:
                    bench.warm_up(plan)
                    warm.add(plan)
                row = bench.compare(plan, length, repeat)
            except TamisError as error:
                failures[plan] = str(error)
                console.print(f"{where}: FAILED: {error}", markup=False, soft_wrap=True)
                continue
            file.append(row)
            console.print(
                f"{where}: first token {seconds(row.ttft_s)}, "
                f"{ratio(row.ttft_s / row.dense_ttft_s)}; each {seconds(row.tpot_s)}, "
                f"{ratio(row.tpot_s / row.dense_tpot_s)}; "
                f"KV {ratio(row.kv_bytes / row.kv_bytes_dense)}; "
                f"took {time.perf_counter() - start:.0f} s",
                markup=False,
                soft_wrap=True,
            )
    return failures


def judge_plans(
    llm: LLM, exercises: Sequence[Exercise], settings: Sequence[Setting], file: ResultFile[Answer]
) -> Failures:
    """Answer what `file` does not hold yet, method by method, exact attention first."""
    failures: Failures = {}
    for name, texts in [(DENSE, (DENSE,)), *((s.method, s.judged) for s in settings)]:
        try:
            plans = {text: Plan.parse(text) for text in texts}
            work = open_work(exercises, plans, file.rows)
            if work.characters:
                with progress(name, work.characters) as advance:
                    run_answers(llm, work, Prompting(), file, advance)
        except TamisError as error:
            failures[name] = str(error)
    latest = {row.key: row for row in file.rows}
    return failures | {row.plan: row.error for row in latest.values() if row.error is not None}


def chosen(only: Sequence[str]) -> list[Setting]:
    """The settings of some methods, or of all where none is named.

    Raises:
        ConfigError: there is no method of that name here.
    """
    names = [setting.method for setting in SETTINGS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ConfigError(f"--only has {unknown[0]!r}; it takes one of {', '.join(names)}")
    return [setting for setting in SETTINGS if not only or setting.method in only]


def summary(
    record: Record, wanted: Settings, rounds: Sequence[Round], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Everything that is needed to write the page, or to read the numbers later."""
    goals = goal_rows(rounds, judged=wanted.goals)
    return {
        "benchmark": "methods",
        **asdict(record),
        "measured": asdict(wanted),
        "goals": [row.record() for row in goals],
        "timings": timing_rows(rounds),
        "quality": quality_rows(answers),
    }


def _run(
    wanted: Settings, settings: Sequence[Setting], out: Path, console: Console
) -> tuple[Record, list[Round], list[Answer], Failures]:
    """Measure what is left to be measured in `out`."""
    llm = LLM(wanted.model, kv_memory=_KV_MEMORY)
    conditions = Conditions(
        model=llm.model.name,
        parameters=llm.model.n_parameters,
        dtype=str(llm.model.dtype).removeprefix("torch."),
        device=str(llm.model.device),
        haystack="",
        samples=wanted.samples,
        seed=0,
        kinds=KINDS,
        phrasings=PHRASINGS,
        chat=False,
        truncate=False,
        new_tokens=wanted.new_tokens,
    )
    record = replace(record_of(conditions), command=shlex.join(["python", *sys.argv]))
    record.keep(out / "run.json")
    suites = [
        Suite(task, length, wanted.samples)
        for length in wanted.judged_lengths
        for task in wanted.tasks
    ]
    with (
        ResultFile(out / "timings.jsonl", Round) as timings,
        ResultFile(out / "answers.jsonl", Answer) as answers,
    ):
        failures = time_plans(wanted, settings, timings, console)
        exercises = generated(llm, suites, out / "samples")
        failures |= judge_plans(llm, exercises, settings, answers)
        rounds = [row for row in timings.rows if isinstance(row, Round)]
        return record, rounds, answers.rows, failures


def _show(goals: Sequence[Row], quality: Iterable[dict[str, Any]], console: Console) -> None:
    for row in quality:
        score = "no answer" if row["score"] is None else f"score {100 * row['score']:.1f}"
        console.print(
            f"{row['plan']}, {length_text(row['length'])}: {score}, KV "
            + (ratio(row["kv_share"]) if row["kv_share"] is not None else "unknown"),
            markup=False,
        )
    console.print(table(goals, "dense"))


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, some minutes; no goal is judged.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="METHOD", help="May be given several times."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of all but the longest prompts.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Documents per task and length.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and the kernels.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where measurements go; what is there is gone on with."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help=f"Where the summary goes; by default {RESULTS.name}."
        ),
    ] = None,
) -> None:
    """Measure every method's time, memory and quality against exact attention."""
    quiet_logs(debug=False)
    torch.set_num_threads(threads)
    settings = chosen(only or [])
    wanted = Settings(repeat=repeat, samples=samples, threads=threads)
    if quick:
        wanted = wanted.quick()
    out = out or _OUT / ("methods-quick" if quick else "methods")
    target = json_file or (out / "methods.json" if quick else RESULTS)
    files.check_writable(target, "the summary")
    console = Console(stderr=True, highlight=False)
    record, rounds, answers, failures = _run(wanted, settings, out, console)

    result = summary(record, wanted, rounds, answers)
    text = json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n"
    files.write_whole(target, text, "the summary")
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = _FILE_WIDTH
    for label, value in record.machine.items():
        screen.print(f"{label}: {value}", markup=False, soft_wrap=True)
    _show(goal_rows(rounds, judged=wanted.goals), result["quality"], screen)
    if quick:
        screen.print("Small sizes: these numbers show that it runs, and nothing else.")
    screen.print(f"written to {target}")
    for name, reason in failures.items():
        console.print(f"not measured: {name}: {reason}", markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
