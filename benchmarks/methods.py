"""Every method against exact attention: time, memory and quality.

    python benchmarks/methods.py                  # half an hour on two cores
    python benchmarks/methods.py --quick          # small sizes, a minute: whether it runs at all
    python benchmarks/methods.py --only snapkv    # one method, and exact attention

Time and memory are measured on the Llama of random weights of `benchmarks/engine.py`, in bf16: each
plan's prompt, and then decode steps in turns with those of exact attention. Quality is measured on
the reference model, on tasks whose answers are known. `methods_plans.py` says how each method is
set, `methods_parts.py` what is measured.

Every measurement is a line in --out the moment it is there: the same command goes on after Ctrl-C,
and what fails is tried again. --timings-only and --quality-only do one part each; only times need a
machine that does nothing else. The summary of all that is in --out goes to results/methods.json,
from which `methods_page.py` writes docs/methods.md.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from methods_page import MEASURES, Results, measures
from methods_parts import Failures, Settings, judge_plans, time_plans, work_left
from methods_plans import DENSE, SETTINGS, Setting
from methods_summary import goal_rows, quality_rows, timing_rows
from methods_timing import Round
from report import Row, table
from tamis import LLM, files
from tamis.bench.record import Settings as Conditions
from tamis.bench.results import Answer, ResultFile
from tamis.bench.suites import generated
from tamis.bench.tasks.puzzle import KINDS, PHRASINGS
from tamis.bench.tasks.samples import Suite
from tamis.cli.reporting import record_of
from tamis.cli.terminal import quiet_logs
from tamis.errors import ConfigError, TamisError

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods.json"
_OUT = HERE.parent / "out"
_FILE_WIDTH = 150
_KV_MEMORY = "2GiB"


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


def measure_times(
    wanted: Settings, settings: Sequence[Setting], out: Path, console: Console
) -> Failures:
    """Time what is not there yet, into `out`/timings.jsonl.

    Raises:
        ConfigError: what is there was measured on another machine, or otherwise.
    """
    conditions = Conditions(
        model="Llama of random weights",
        parameters=wanted.shape.parameters,
        dtype=str(wanted.shape.dtype).removeprefix("torch."),
        device="cpu",
        haystack="",
        samples=0,
        seed=0,
        kinds=(),
        phrasings=(),
        chat=False,
        truncate=False,
        new_tokens=wanted.cases[0].new_tokens,
    )
    with ResultFile(out / "timings.jsonl", Round) as file:
        done = {row.key for row in file.rows}
        if all((plan, case.length, n) in done for plan, case, n in wanted.rounds(settings)):
            return {}
        keep_record(conditions, out / "timings.json", same_machine=True)
        return time_plans(wanted, settings, file, console)


def measure_answers(
    wanted: Settings, settings: Sequence[Setting], out: Path, console: Console
) -> Failures:
    """Answer what is not there yet, into `out`/answers.jsonl.

    Raises:
        ConfigError: what is there was answered by another model or of other samples.
    """
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
        new_tokens=0,
    )
    suites = [
        Suite(task, length, wanted.samples)
        for length in wanted.judged_lengths
        for task in wanted.tasks
    ]
    exercises = generated(llm, suites, out / "samples")
    record = out / "answers.json"
    with ResultFile(out / "answers.jsonl", Answer) as file:
        work = work_left(exercises, settings, file.rows)
        if work or not record.exists():
            keep_record(conditions, record)
        return judge_plans(llm, work, file, console)


def keep_record(conditions: Conditions, path: Path, *, same_machine: bool = False) -> None:
    """Write when and where a part is measured.

    Raises:
        ConfigError: what is there was measured under other conditions, or, with `same_machine`,
            elsewhere.
    """
    record = replace(record_of(conditions), command=shlex.join(["python", *sys.argv]))
    if same_machine and path.exists():
        before, now = _record(path)["machine"]["processor"], record.machine["processor"]
        if before != now:
            raise ConfigError(
                f"the times in {path.parent} were measured on {before}, and this is {now}; "
                "give another --out"
            )
    record.keep(path)


def _record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def summary(out: Path, wanted: Settings) -> tuple[dict[str, Any], list[Row]]:
    """All that was ever measured into `out`, as it takes to write the page or to read the numbers
    later; and the goals."""
    with ResultFile(out / "timings.jsonl", Round) as timings:
        rounds = [row for row in timings.rows if isinstance(row, Round)]
    with ResultFile(out / "answers.jsonl", Answer) as answers:
        quality = quality_rows(answers.rows)
    records = {part: out / f"{part}.json" for part in ("timings", "answers")}
    goals = goal_rows(rounds, judged=wanted.goals)
    return {
        "benchmark": "methods",
        "runs": {part: _record(path) for part, path in records.items() if path.exists()},
        "measured": asdict(wanted),
        "goals": [row.record() for row in goals],
        "timings": timing_rows(rounds),
        "quality": quality,
    }, goals


def overview(settings: Sequence[Setting], results: Results) -> Table:
    """A row per method, as on the page."""
    result = Table()
    result.add_column("", overflow="fold")
    for column in MEASURES:
        result.add_column(column, justify="right")
    result.add_row(DENSE, *measures(DENSE, (DENSE,), results))
    for setting in settings:
        result.add_row(setting.method, *measures(setting.timed[0], setting.judged, results))
    return result


def _show(result: Mapping[str, Any], goals: Sequence[Row], console: Console) -> None:
    for part, record in result["runs"].items():
        console.print(
            f"{part}: {record['date']}, {record['machine']['processor']} "
            f"({record['machine']['instruction sets']})",
            markup=False,
            soft_wrap=True,
        )
    console.print(overview(SETTINGS, Results(result)))
    if goals:
        console.print(table(goals, DENSE))


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, a minute; no goal is judged.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="METHOD", help="May be given several times."),
    ] = None,
    timings_only: Annotated[
        bool, typer.Option("--timings-only", help="Times and memory, and no answers.")
    ] = False,
    quality_only: Annotated[
        bool, typer.Option("--quality-only", help="Answers, and no times.")
    ] = False,
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
    wanted = Settings(threads=threads)
    if quick:
        wanted = wanted.quick()
    out = out or _OUT / ("methods-quick" if quick else "methods")
    target = json_file or (out / "methods.json" if quick else RESULTS)
    console = Console(stderr=True, highlight=False)
    failures: Failures = {}
    try:
        if timings_only and quality_only:
            raise ConfigError("--timings-only and --quality-only leave nothing to measure")
        settings = chosen(only or [])
        files.check_writable(target, "the summary")
        if not quality_only:
            failures |= measure_times(wanted, settings, out, console)
        if not timings_only:
            failures |= measure_answers(wanted, settings, out, console)
        result, goals = summary(out, wanted)
        text = json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n"
        files.write_whole(target, text, "the summary")
    except TamisError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on with what is in {out}", soft_wrap=True)
        raise typer.Exit(130) from None

    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = _FILE_WIDTH
    _show(result, goals, screen)
    if quick:
        screen.print("Small sizes: these numbers show that it runs, and nothing else.")
    screen.print(f"written to {target}", soft_wrap=True)
    for plan, reason in failures.items():
        console.print(f"not measured: {plan}: {reason}", markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
