"""Runs one part of the comparison: its engines side by side, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from peers_process import EngineError, Process
from peers_roster import ENGINES, Part
from report import best_rates
from tamis.cli.machine import measure_rates

_ANSWER_S = 900
_WARM_UP = 128


class Field:
    """The engines of a part that still run, each with its samples.

    Attributes:
        samples: by engine, then by what was measured.
        failed: why an engine ran no further, by its name.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._processes: dict[str, Process] = {}
        self._say = say
        self.samples: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def start(self, name: str, directory: Path, threads: int, log: Path) -> None:
        """Start an engine and load its model."""
        self._say(f"{name}: loading")
        try:
            self._processes[name] = Process(ENGINES[name], directory, threads, log)
        except EngineError as error:
            self.failed[name] = str(error)

    def turn(self, do: str, note: Callable[[dict[str, Any], Any], None], **arguments: Any) -> None:
        """Ask every engine the same, one after the other; `note` keeps its answer in its samples.
        An engine that cannot answer leaves the field."""
        for name, process in list(self._processes.items()):
            self._say(f"{name}: {do}")
            try:
                value = process.ask(do, _ANSWER_S, **arguments)
            except EngineError as error:
                self.failed[name] = f"{do}: {error}"
                self._processes.pop(name).close()
            else:
                note(self.samples.setdefault(name, {}), value)

    @property
    def cpu_s(self) -> float:
        """Processor seconds that the engines which still run have taken."""
        return sum(process.cpu_s for process in self._processes.values())

    def close(self) -> None:
        """End every process."""
        for process in self._processes.values():
            process.close()


def run(
    part: Part, directory: Path, threads: int, logs: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run a part.

    Args:
        part: what is measured.
        directory: its model, with a GGUF file where an engine needs one.
        threads: of every engine.
        logs: a directory for what the engines print.
        say: is told what runs.

    Returns:
        What is measured, as one line of JSON: samples by engine, the machine's rates (the best of
        before and after), the share of its processors that other processes took, and why engines
        failed.
    """
    say("the machine's rates")
    rates = [measure_rates()]
    with _field(say) as field:
        for name in part.engines:
            field.start(name, directory, threads, logs / f"{name}.log")
        busy, ours, start = _busy_s(), field.cpu_s, time.perf_counter()
        if part.requests:
            _requests(part, field)
        else:
            _steps(part, field)
        wall = psutil.cpu_count() * (time.perf_counter() - start)
        others = max(0.0, _busy_s() - busy - (field.cpu_s - ours)) / wall
    say("the machine's rates")
    rates.append(measure_rates())
    return {
        "part": asdict(part),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "rates": asdict(best_rates(rates)),
        "others": others,
        "samples": field.samples,
        "failed": field.failed,
    }


def _busy_s() -> float:
    """Processor seconds of everything that has run on this machine, and what its host took."""
    times = psutil.cpu_times()._asdict()
    return sum(
        times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")
    )


def _steps(part: Part, field: Field) -> None:
    """One request: prompts in turns, then decoding after the last of them in turns."""
    field.turn("prefill", _forget, tokens=_WARM_UP, seed="warm-up")
    field.turn("decode", _forget, tokens=2)
    field.turn("watch_memory", _keep("resident_before"))
    for i in range(part.prefills):
        field.turn("prefill", _append("prefill_s"), tokens=part.tokens, seed=f"{part.name}/{i}")
    field.turn("kv_bytes", _keep("kv_bytes"))
    for _ in range(part.rounds):
        field.turn("decode", _append("decode_s"), tokens=part.new_tokens)
    field.turn("memory", _keep("memory"))
    field.turn("profile", _keep("profile"), tokens=part.new_tokens)


def _requests(part: Part, field: Field) -> None:
    """Several requests at once."""
    sizes = {"requests": part.requests, "tokens": part.tokens, "new_tokens": part.new_tokens}
    small = {"requests": 2, "tokens": _WARM_UP, "new_tokens": 4}
    field.turn("answer", _forget, **small, seed="warm-up")
    field.turn("watch_memory", _keep("resident_before"))
    for i in range(part.rounds):
        field.turn("answer", _append("throughput"), **sizes, seed=f"{part.name}/{i}")
    field.turn("memory", _keep("memory"))


@contextmanager
def _field(say: Callable[[str], None]) -> Iterator[Field]:
    """A field whose processes end with it, Ctrl-C included."""
    field = Field(say)
    try:
        yield field
    finally:
        field.close()


def _keep(name: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda samples, value: samples.__setitem__(name, value)


def _append(name: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda samples, value: samples.setdefault(name, []).append(value)


def _forget(samples: dict[str, Any], value: Any) -> None:
    """Warm-up: its time is no sample."""
