"""`tamis client-bench`: load on any OpenAI-compatible server, and what its clients saw."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamis.cli import options, terminal
from tamis.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from tamis.load.measure import Target
    from tamis.load.run import Progress
    from tamis.load.summary import Objectives, Percentiles, Summary
    from tamis.load.workload import Workload


def client_bench(
    url: Annotated[
        str, typer.Option(help="Of the API: everything before /completions.")
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="Its name.", show_default="the first that the server lists")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Better in the environment.", envvar="OPENAI_API_KEY"),
    ] = None,
    rate: Annotated[
        float, typer.Option(metavar="X", help="Requests per second; they come as Poisson's do.")
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many.", show_default="100, or what --duration takes"),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="For how long requests are sent.")
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="Length of prompts: 512, 'uniform(64, 512)', or 'lognormal(512, 0.5)' "
            "with its median and sigma.",
        ),
    ] = "lognormal(512, 0.5)",
    output: Annotated[
        str, typer.Option(metavar="TOKENS", help="Length of answers at the most, likewise.")
    ] = "128",
    shared: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of every prompt that all begin with.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all that is drawn.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask /chat/completions instead of /completions.")
    ] = False,
    body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="""More fields of every request: '{"ignore_eos": true}', '{"kv_plan": "..."}'.""",
        ),
    ] = None,
    ttft: Annotated[
        float, typer.Option(metavar="SECONDS", help="A good answer's first token comes within.")
    ] = 2.0,
    tpot: Annotated[
        float, typer.Option(metavar="SECONDS", help="The time between its tokens at the most.")
    ] = 0.1,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="A server silent for so long has failed.")
    ] = 300,
    file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Where to write all of it.")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Measure an OpenAI-compatible server under load.

    Requests come at random times, at a rate that does not wait for answers, with random words for
    prompts. Goodput is the rate of requests that were answered within both objectives. Ctrl-C
    reports what there is.

    Example: tamis client-bench --rate 4 --duration 60 --shared 0.5 --output "uniform(32, 256)"
    """
    if importlib.util.find_spec("httpx") is None:
        raise ConfigError("measuring a server needs httpx; install: pip install 'tamis[serve]'")
    from tamis import files
    from tamis.load import lengths
    from tamis.load.measure import Target
    from tamis.load.summary import Objectives, Summary
    from tamis.load.workload import Workload

    for name, value in (("requests", requests), ("duration", duration), ("timeout", timeout)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value}; it must be more than 0")
    if file is not None:
        files.check_writable(file, "the results")
    workload = Workload(rate, lengths.parse(prompt), lengths.parse(output), shared, seed)
    target = Target(url, model, chat, _fields(body), timeout, api_key)
    most = 100 if requests is None and duration is None else requests
    target, progress, interrupted = asyncio.run(_measure(target, workload, most, duration))
    objectives = Objectives(ttft, tpot)
    summary = Summary.of(progress, objectives)
    _show(summary, objectives)
    if file is not None:
        its_target = asdict(target)
        del its_target["api_key"]
        written = {
            "target": its_target,
            "workload": asdict(workload) | {"prompt": prompt, "output": output},
            "objectives": asdict(objectives),
            "summary": asdict(summary),
            "requests": [asdict(outcome) for outcome in progress.outcomes],
        }
        files.write_whole(file, json.dumps(written, indent=2) + "\n", "the results")
    if interrupted:
        raise typer.Exit(130)
    if not summary.answered:
        raise typer.Exit(1)


def _fields(body: str | None) -> dict[str, Any]:
    """More fields of requests, as they are given.

    Raises:
        ConfigError: they are no JSON object.
    """
    try:
        fields = json.loads(body or "{}")
    except ValueError as error:
        raise ConfigError(f"--body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--body is {body}; it must be a JSON object")
    return fields


async def _measure(
    target: Target, workload: Workload, most: int | None, duration: float | None
) -> tuple[Target, Progress, bool]:
    """As `measure`, with a bar on stderr; and whether Ctrl-C ended it."""
    from tamis.load.measure import measure

    stop = asyncio.Event()
    with _interrupting(stop), _bar(most) as bar:
        task = bar.add_task("", total=most)

        def changed(progress: Progress) -> None:
            n_ended = len(progress.outcomes)
            n_failed = sum(outcome.error is not None for outcome in progress.outcomes)
            what = f"{progress.sent} sent, {n_ended} ended, {n_failed} failed"
            bar.update(task, completed=n_ended, description=what)

        target, progress = await measure(target, workload, most, duration, stop, changed)
    return target, progress, stop.is_set()


@contextmanager
def _interrupting(stop: asyncio.Event) -> Iterator[None]:
    """Inside, Ctrl-C sets `stop` and nothing else."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _bar(most: int | None) -> Bar:
    """A bar on stderr that vanishes at the end; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    return Bar(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show(summary: Summary, objectives: Objectives) -> None:
    """Print what was found."""
    from rich.table import Table

    facts = [
        ("requests", f"{summary.sent} sent, {summary.answered} answered, {summary.failed} failed"),
        ("time", f"{summary.elapsed_s:.1f} s, {summary.requests_s:.2f} answers/s"),
        (
            "tokens",
            f"{summary.output_tokens_s:.1f} generated/s, {summary.prompt_tokens_s:.1f} "
            "of prompts/s",
        ),
        (
            "lengths",
            f"{summary.prompt_tokens:.0f} tokens of prompt, {summary.output_tokens:.0f} "
            "of answer, on average",
        ),
        (
            "goodput",
            f"{summary.goodput:.2f} requests/s: {summary.good} of {summary.sent} with a "
            f"first token within {objectives.ttft_s:g} s and {objectives.tpot_s:g} s per token",
        ),
    ]
    if summary.unfinished:
        facts[0] = (facts[0][0], f"{facts[0][1]}, {summary.unfinished} given up")
    facts += [("error", f"{count} × {error}") for error, count in summary.errors.items()]  # noqa: RUF001
    console = terminal.output_console()
    for name, fact in facts:
        console.print(f"{name:9} {fact}", markup=False)
    table = Table("ms", "mean", "p50", "p90", "p95", "p99", "most", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, times in (
        ("first token", summary.ttft),
        ("per token", summary.tpot),
        ("longest gap", summary.longest_gap),
        ("whole", summary.total),
    ):
        table.add_row(name, *_milliseconds(times))
    console.print()
    console.print(table)


def _milliseconds(times: Percentiles | None) -> list[str]:
    if times is None:
        return ["–"] * 6  # noqa: RUF001
    return [f"{1000 * seconds:.1f}" for seconds in vars(times).values()]
