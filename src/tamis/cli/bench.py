"""`tamis bench`: plans × tasks × lengths on one model, as JSON lines, a table and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamis.cli import options, terminal
from tamis.cli.reporting import missing_libraries, record_of
from tamis.errors import ConfigError

if TYPE_CHECKING:
    from tamis.model import Model

_TASKS = (
    "single,multi_key,key_value,multi_value,multi_query,variables,frequent,multi_turn,perplexity"
)
_NEW_TOKENS = 32

Files = list[Path] | None

_Pass = tuple[str, int, Callable[[Callable[[int], None]], None]]
"""A part of a run: its name, how much of it is left, and what does it and tells of its progress."""


def _files(format: str) -> Any:
    text = f"A file in {format}'s published format; may be given several times."
    return typer.Option(metavar="FILE", help=text)


def bench(
    model: options.Model,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            "--plans",
            metavar="PLANS",
            help="Plans to compare, with ; between them; may be given several times.",
            show_default="dense",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks, with commas between them.",
            show_default=f"{_TASKS}, or none where published files are given",
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Tokens of the documents; k is 1024.")
    ] = "1k,4k",
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Documents per task and length, or file.")
    ] = 10,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides the documents.")] = 0,
    kinds: Annotated[
        str, typer.Option(metavar="NAMES", help="Kinds of values asked for.")
    ] = "word,number",
    phrasings: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Phrasings: restated ends with the key asked for."),
    ] = "restated,natural",
    haystack: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text to hide facts in.", show_default="Python's own library"
        ),
    ] = None,
    ruler: Annotated[Files, _files("RULER")] = None,
    longbench: Annotated[Files, _files("LongBench")] = None,
    infinitebench: Annotated[Files, _files("InfiniteBench")] = None,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Cut the middle out of published prompts too long for it."),
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in the model's chat template.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure times and memory over time.")
    ] = True,
    repeat: Annotated[
        int, typer.Option(metavar="K", min=1, help="Rounds in which times are measured.")
    ] = 3,
    depths: Annotated[
        int, typer.Option(metavar="N", min=1, help="Parts of a document in the depth heatmaps.")
    ] = 5,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where results go; what is there is gone on with.")
    ] = Path("out/bench"),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The report.", show_default="report.html in --out"),
    ] = None,
    dtype: options.Dtype = "auto",
    weights: options.Weights = None,
    kv_memory: options.KVMemory = "4GiB",
    max_batch_tokens: options.MaxBatchTokens = 2048,
    debug: options.Debug = False,
) -> None:
    """Measure quality, memory and time of plans on a model.

    Results go to --out as they come, then a table to stdout and an HTML report.

    After Ctrl-C, the same command goes on; with more plans or tasks it adds them.

    Example: tamis bench --model DIR --tasks single,multi_key --lengths 1k,4k --samples 20
    """
    missing = missing_libraries()
    if missing is not None:
        raise ConfigError(missing)
    from tamis.bench.lists import parse_choices, parse_lengths, parse_names, parse_plans
    from tamis.bench.perplexity import PERPLEXITY, cut_windows, open_readings, run_readings
    from tamis.bench.record import Settings
    from tamis.bench.report import check_writable, write_report
    from tamis.bench.results import Answer, Reading, ResultFile, Timing
    from tamis.bench.runner import Prompting, check_work, open_work, run_answers
    from tamis.bench.speed import SpeedWork, run_timings
    from tamis.bench.suites import generated, published
    from tamis.bench.summary import Summary
    from tamis.bench.tasks.corpus import haystack_lines
    from tamis.bench.tasks.puzzle import KINDS, PHRASINGS
    from tamis.bench.tasks.samples import Suite
    from tamis.bench.tasks.scenes import TASKS
    from tamis.cli import bench_screen

    plans = parse_plans(plan or ["dense"])
    sizes = parse_lengths(lengths)
    some_kinds = parse_choices(kinds, KINDS, "--kinds")
    some_phrasings = parse_choices(phrasings, PHRASINGS, "--phrasings")
    report = report or out / "report.html"
    check_writable(report)
    files: dict[str, Sequence[Path]] = {
        "ruler": ruler or [],
        "longbench": longbench or [],
        "infinitebench": infinitebench or [],
    }
    if tasks is None:
        tasks = "" if any(files.values()) else _TASKS
    names: tuple[str, ...] = ()
    if parse_names(tasks):
        names = parse_choices(tasks, (*TASKS, PERPLEXITY), "--tasks")
    suites = [
        Suite(task, size, samples, seed, some_kinds, some_phrasings, haystack=haystack)
        for size in sizes
        for task in names
        if task != PERPLEXITY
    ]
    exercises = published(files, samples)
    text = "".join(haystack_lines(haystack))

    from tamis.llm import LLM

    terminal.quiet_logs(debug)
    llm = LLM(
        model,
        dtype=dtype,
        weights=weights,
        kv_memory=kv_memory,
        max_batch_tokens=max_batch_tokens,
    )
    exercises += generated(llm, suites, out / "samples")
    windows = cut_windows(llm, text, sizes if PERPLEXITY in names else (), samples, seed)
    settings = Settings(
        model=llm.model.name,
        parameters=llm.model.n_parameters,
        dtype=_dtype(llm.model),
        device=str(llm.model.device),
        haystack="" if haystack is None else str(haystack),
        samples=samples,
        seed=seed,
        kinds=some_kinds,
        phrasings=some_phrasings,
        chat=chat,
        truncate=truncate,
        new_tokens=_NEW_TOKENS,
    )
    record = record_of(settings)
    prompting = Prompting(chat, truncate)
    with (
        ResultFile(out / "answers.jsonl", Answer) as answers,
        ResultFile(out / "perplexity.jsonl", Reading) as readings,
        ResultFile(out / "timings.jsonl", Timing) as timings,
    ):
        work = open_work(exercises, plans, answers.rows)
        read = open_readings(windows, plans, readings.rows)
        done = frozenset(timing.key for timing in timings.rows)
        timed = SpeedWork(plans, sizes if speed else (), repeat, _NEW_TOKENS, text, done)
        check_work(llm, work, prompting)
        read.check(llm)
        timed.check(llm)
        record.keep(out / "run.json")
        passes: tuple[_Pass, ...] = (
            ("answers", work.characters, partial(run_answers, llm, work, prompting, answers)),
            ("perplexity", read.tokens, partial(run_readings, llm, read, readings)),
            ("times", timed.tokens, partial(run_timings, llm, timed, timings)),
        )
        _run(passes, partial(_kept, answers.rows, readings.rows, timings.rows), out)
        summary = Summary(answers.rows, timings.rows, readings.rows, first=list(plans))
    write_report(report, record, summary, depths)
    bench_screen.show(summary)
    if summary.failed:
        terminal.say(f"{summary.failed} requests failed; the same command tries them again")
    terminal.say(f"report: {report}")


def _dtype(model: Model) -> str:
    """What the model computes in, and what its linear layers' weights are kept in if it is less."""
    dtype = str(model.dtype).removeprefix("torch.")
    return dtype if model.weights is None else f"{dtype} with {model.weights} weights"


def _run(passes: Iterable[_Pass], kept: Callable[[], str], out: Path) -> None:
    """Do what is left of each pass; says how to go on when it is interrupted.

    Args:
        kept: tells what `out` holds by then, "" for nothing.
    """
    from tamis.cli.bench_screen import progress

    if before := kept():
        terminal.say(f"going on with {before} in {out}")
    try:
        for name, left, run in passes:
            if left:
                with progress(name, left) as advance:
                    run(advance)
    except KeyboardInterrupt:
        there = kept() or "no results yet"
        terminal.say(f"{there} in {out}; the same command goes on with what is left")
        raise


def _kept(answers: Sized, readings: Sized, timings: Sized) -> str:
    """How many results of each kind there are, in words; "" for none."""
    counts = {"answers": answers, "windows read": readings, "timings": timings}
    return ", ".join(f"{len(rows):,} {name}" for name, rows in counts.items() if len(rows))
