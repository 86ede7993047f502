"""Progress on the terminal: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Screen:
    """Shows reports of the training loop; use it as a context manager. Quiet if not `shown`."""

    def __init__(self, *, shown: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(quiet=not shown)
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=1.0)

    def show(self, record: dict[str, Any]) -> None:
        """One line per report, and the bar if there is one."""
        firsts = " ".join(f"{task}:{value:.2f}" for task, value in record["first"].items())
        self._console.print(
            f"step {record['step']:>5}  length {record['length']:>5}  {record['minutes']:7.1f} min"
            f"  {record['tokens_per_s']:>6} tok/s ({record['threads']} threads)"
            f"  answers {record['answer_loss']:.3f}  text {record['text_loss']:.3f}  {firsts}",
            highlight=False,
            soft_wrap=True,
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["progress"])

    def note(self, text: str) -> None:
        """A line that is not a report."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
