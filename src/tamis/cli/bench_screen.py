"""What `tamis bench` shows: progress while it runs, a table at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tamis.bench.summary import Summary
from tamis.bench.text import (
    NOTHING,
    length_text,
    mebibytes,
    percent,
    perplexity,
    ratio,
    seconds,
)

if TYPE_CHECKING:
    from rich.table import Table

_MEMORY = 600.0  # seconds that the estimate of the remaining time looks back
_FILE_WIDTH = 200


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the remaining time; the function it gives advances it.

    Where stderr is no terminal, the bar is printed once, at its end.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=_MEMORY,
        transient=console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


def show(summary: Summary) -> None:
    """Print tables on stdout: scores, perplexity, costs; each with a row per length and plan."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no edge at which columns would have to be cut
        console.width = _FILE_WIDTH
    if summary.answers:
        console.print(_scores(summary))
    if summary.readings:
        console.print(_perplexities(summary))
    if summary.answers or summary.timings:
        console.print(_costs(summary))


def _scores(summary: Summary) -> Table:
    table = _table("scores, %", summary, ["mean", *summary.tasks])
    for length in summary.lengths:
        for plan in summary.plans:
            scores = [summary.cell(plan, task, length).score for task in summary.tasks]
            mean = summary.overall(plan, length)
            table.add_row(plan, length_text(length), *map(percent, [mean, *scores]))
        table.add_section()
    return table


def _perplexities(summary: Summary) -> Table:
    title = "perplexity of held-out text, second half of each window"
    table = _table(title, summary, ["perplexity", "scored tokens", "KV peak, MiB"])
    for length in summary.read_lengths:
        for plan in summary.plans:
            found = summary.perplexity(plan, length)
            if found is not None:
                peak = mebibytes(found.memory.peak) if found.memory else NOTHING
                numbers = (perplexity(found.value), f"{found.tokens:,}", peak)
                table.add_row(plan, length_text(length), *numbers)
        table.add_section()
    return table


def _costs(summary: Summary) -> Table:
    times = ["first token", "to exact", "each token", "to exact"] if summary.timings else []
    sizes = ["KV kept, MiB", "to exact", "KV peak, MiB"]
    table = _table("costs of one request", summary, [*sizes, *times])
    lengths = [*summary.lengths, *(n for n in summary.timed_lengths if n not in summary.lengths)]
    for length in lengths:
        for plan in summary.plans:
            memory, speed = summary.memory(plan, length), summary.speed(plan, length)
            memory = memory or (speed.memory if speed is not None else None)
            took = [NOTHING] * len(times)
            if speed is not None:
                took = [
                    seconds(speed.ttft_s.median),
                    ratio(speed.ttft_ratio.median),
                    seconds(speed.tpot_s.median),
                    ratio(speed.tpot_ratio.median),
                ]
            held = [NOTHING] * len(sizes)
            if memory is not None:
                held = [mebibytes(memory.end), ratio(memory.kept), mebibytes(memory.peak)]
            table.add_row(plan, length_text(length), *held, *took)
        table.add_section()
    return table


def _table(title: str, summary: Summary, columns: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("plan", overflow="fold", min_width=min(24, max(map(len, summary.plans))))
    for column in ["tokens", *columns]:
        table.add_column(column, justify="right", overflow="fold")
    return table
