"""What the commands share when they talk to a terminal, a pipe or a file.

Results go to stdout; everything else (progress, measurements, warnings, errors) goes to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer

from tamis.errors import TamisWarning

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

    from tamis.engine.engine import EngineStats


def say(line: str) -> None:
    """Print a line on stderr."""
    typer.echo(line, err=True)


def set_debugging(ctx: typer.Context, wanted: bool) -> bool:
    """Remember for the whole command whether `--debug` was given (a typer option callback)."""
    if wanted:
        ctx.find_root().meta["tamis.debug"] = True
    return wanted


def debugging(ctx: Any) -> bool:
    """Whether `--debug` was given."""
    return bool(ctx.find_root().meta.get("tamis.debug", False))


def discard_stdout() -> None:
    """Send what is still to be written to stdout nowhere, after its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, tamis's own warnings print as one line each and other libraries' not at all."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", TamisWarning)
            warnings.showwarning = show
        yield


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Inside, torchao, which Transformers imports with its models where it is installed, says
    nothing about the libraries for other machines that it cannot load. A program may do so; tamis
    as a library leaves the loggers of others to the program that imports it."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_logs(debug: bool) -> None:
    """Keep the advice of Transformers and tracebacks of failed steps off the terminal.

    What matters of either reaches the user as an error. Does nothing with `debug`.
    """
    if debug:
        return
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("tamis").addHandler(logging.NullHandler())


def output_console() -> Console:
    """A console on stdout that leaves a closed pipe to the command, as `typer.echo` does."""
    from rich.console import Console

    class OutputConsole(Console):
        """Rich itself would exit with status 1 here."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return OutputConsole(highlight=False, soft_wrap=True)


def prefill_bar(stats: EngineStats, n_tokens: int) -> Progress:
    """A bar on stderr that follows how many of `n_tokens` prompt tokens are computed.

    It vanishes when it is stopped, and shows nothing where stderr is not a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    start = stats.prefill_tokens

    class PrefillBar(Progress):
        """Reads the counter whenever it is drawn, so that the engine need not know of it."""

        def get_renderables(self) -> Iterable[RenderableType]:
            for task in self.task_ids:
                self.update(task, completed=stats.prefill_tokens - start)
            return super().get_renderables()

    console = Console(stderr=True)
    bar = PrefillBar(
        "reading the prompt",
        BarColumn(),
        MofNCompleteColumn(),
        "tokens",
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("prefill", total=n_tokens)
    return bar
