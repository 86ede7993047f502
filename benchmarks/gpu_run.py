"""The parts of `gpu.py` in their order, until the time is up, and what is left of them."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gpu_checks
import gpu_graphs
import gpu_times
import gpu_transfers
import tamis
from gpu_checks import Check
from gpu_engine import TamisOn, TransformersOn, prompt
from gpu_graphs import StepTimes
from gpu_times import Item, Rates, Sizes, Timing
from random_llama import LlamaShape
from report import number
from tamis.cli.machine import this_machine
from timing import Spread, in_turns

CHECKS, TIMES, ENGINE = 0.45, 0.75, 0.95
"""When each part ends at the latest, as shares of the time."""

_PACKAGES = ("torch", "triton", "transformers")


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        device: "cuda", or "cpu" for Triton's interpreter.
        most, chunk: sizes of the checks: tokens of the longest context, and of a prompt's chunk.
        contexts: prompt lengths of the end-to-end part; decoded: tokens generated after each.
        same: prompt lengths after which the greedy tokens of both engines are compared, in fp32,
            and those of decode steps with and without CUDA graphs.
        rows: requests that decode at once where such steps are timed, after `row_context` tokens.
        minutes: all of it.
    """

    device: str
    minutes: float
    most: int = 3000
    chunk: int = 333
    sizes: Sizes = field(default_factory=Sizes)
    shape: LlamaShape = field(default_factory=LlamaShape)
    contexts: tuple[int, ...] = (2048, 8192, 32_768)
    decoded: int = 64
    same: tuple[int, ...] = (300, 5000)
    rows: tuple[int, ...] = (1, 8, 32)
    row_context: int = 2048
    rounds: int = 3

    @classmethod
    def tiny(cls, minutes: float) -> Settings:
        """Sizes at which an interpreter of kernels takes seconds."""
        shape = LlamaShape(
            hidden=64,
            intermediate=96,
            layers=2,
            q_heads=4,
            kv_heads=2,
            head_dim=32,
            vocab=128,
            max_tokens=1024,
        )
        tiny = cls("cpu", minutes, 150, 70, Sizes.tiny(), shape, (40,), 3, (40,), rounds=1)
        return replace(tiny, rows=(1, 3), row_context=20)


@dataclass(frozen=True)
class EndToEnd:
    """One request through both engines.

    Attributes:
        prefill_ms, token_ms: of the prompt with its first token, and of each further one, by
            engine, "tamis" first.
        limit_ms: of a token: the bytes of weights and KV over the bandwidth; prefill_limit_ms: the
            prompt's operations over the matmul peak.
    """

    context: int
    dtype: str
    prefill_ms: dict[str, Spread]
    token_ms: dict[str, Spread]
    prefill_limit_ms: float
    limit_ms: float


@dataclass
class Record:
    """What there is so far, and a file that says so.

    Attributes:
        complete: whether nothing was left out; left_out: what was, for want of time.
    """

    settings: Settings
    path: Path
    checks: list[Check] = field(default_factory=list)
    rates: Rates | None = None
    times: list[Timing] = field(default_factory=list)
    end_to_end: list[EndToEnd] = field(default_factory=list)
    steps: list[StepTimes] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def failed(self) -> list[str]:
        """Checks that found a difference or an error, and kernels that could not be timed."""
        checks = [check.kernel for check in self.checks if not check.passed]
        return checks + [one.name for one in self.times if "tamis" in one.errors]

    def save(self) -> None:
        """Write the file."""
        times = [
            asdict(one)
            | {"of_limit": one.of_limit, "overlap": one.overlap}
            | {"ratios": {who: one.ratio(who) for who in one.ms}}
            for one in self.times
        ]
        machine = asdict(this_machine())
        if self.settings.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            machine["gpu"] = {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
            }
        record = {
            "benchmark": "gpu",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "versions": {"python": platform.python_version(), "tamis": tamis.__version__}
            | {name: version(name) for name in _PACKAGES},
            "settings": asdict(self.settings),
            "complete": self.complete,
            "left_out": self.left_out,
            "checks": [asdict(check) for check in self.checks],
            "rates": asdict(self.rates) if self.rates is not None else None,
            "times": times,
            "end_to_end": [asdict(one) for one in self.end_to_end],
            "steps": [asdict(one) for one in self.steps],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        self.path.write_text(text + "\n", encoding="utf-8")


def run(settings: Settings, path: Path, console: Console) -> Record:
    """All parts; whatever ends them early, the file has what there is by then.

    Raises:
        KeyboardInterrupt: after writing the file.
    """
    record = Record(settings, path)
    clock = _Clock(60 * settings.minutes)
    try:
        _check(record, clock, console)
        _time(record, clock, console)
        _compare(record, clock, console)
        record.complete = not record.left_out
    finally:
        record.save()
        console.print(table(record))
        console.print(f"written to {path}")
    return record


def table(record: Record) -> Table:
    """What was measured, a line each."""
    lines = Table("", "ms", "of limit", "times as fast as")
    for one in record.times:
        ours = number(one.ms["tamis"].median) if "tamis" in one.ms else one.errors["tamis"]
        share = one.of_limit
        lines.add_row(
            one.name,
            ours,
            f"{share:.0%}" if share is not None else "",
            ", ".join(f"{who}: {one.ratio(who):.2f}" for who in list(one.ms)[1:])
            + (f"; {one.overlap:.0%} side by side" if one.overlap is not None else ""),
        )
    for two in record.end_to_end:
        for what, ms, limit in (
            ("prefill", two.prefill_ms, two.prefill_limit_ms),
            ("per token", two.token_ms, two.limit_ms),
        ):
            theirs, ours = ms["Transformers"].median, ms["tamis"].median
            lines.add_row(
                f"end to end at {two.context}, {what}",
                number(ours),
                f"{limit / ours:.0%}",
                f"Transformers: {theirs / ours:.2f}",
            )
    for three in record.steps:
        recorded, launched = (three.step_ms[name].median for name in gpu_graphs.WAYS)
        lines.add_row(
            f"decode step of {three.rows}, recorded",
            number(recorded),
            f"{three.limit_ms / recorded:.0%}",
            f"launched: {launched / recorded:.2f}",
        )
    lines.caption = f"{len(record.checks)} checks; failed: {', '.join(record.failed) or 'none'}"
    if record.left_out:
        lines.caption += f"; {len(record.left_out)} things left out"
    return lines


class _Clock:
    """Time that ends by itself.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    def until(self, share: float) -> bool:
        """Whether less than that share of the time has passed."""
        return time.monotonic() - self._start < share * self._seconds


def _check(record: Record, clock: _Clock, console: Console) -> None:
    settings = record.settings
    tiny = settings.device != "cuda"
    for kernel, case in gpu_checks.plan(settings.most, settings.chunk, settings.device, tiny=tiny):
        if not clock.until(CHECKS):
            record.left_out.append(f"check of {kernel}, {case.dtype}, {case.dim}, {case.group}")
            continue
        check = gpu_checks.run(kernel, case)
        record.checks.append(check)
        if not check.passed:
            console.print(f"[bold red]FAILED[/bold red] {check}")
    console.print(f"{len(record.checks)} checks, {len(record.failed)} failed")


def items(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], Item]]]:
    """Everything that is timed."""
    yield from gpu_transfers.items(sizes, device)  # the shortest
    yield from gpu_times.items(sizes, device)


def _time(record: Record, clock: _Clock, console: Console) -> None:
    settings = record.settings
    record.rates = gpu_times.measure_rates(settings.sizes, settings.device)
    for name, build in items(settings.sizes, settings.device):
        if not clock.until(TIMES):
            record.left_out.append(f"time of {name}")
            continue
        torch.manual_seed(0)
        one = gpu_times.time_item(name, build, record.rates, settings.sizes, settings.device)
        record.times.append(one)
        medians = ", ".join(f"{who} {number(spread.median)} ms" for who, spread in one.ms.items())
        console.print(f"{name}: {medians}", *(f"{who}: {why}" for who, why in one.errors.items()))


def _compare(record: Record, clock: _Clock, console: Console) -> None:
    """The end-to-end part."""
    settings = record.settings
    with tempfile.TemporaryDirectory() as directory:
        settings.shape.save(Path(directory))
        for check in _same_tokens(settings, Path(directory), clock, record.left_out):
            record.checks.append(check)
            console.print(f"{check.kernel}: {'equal' if check.passed else check.message}")
        engines = _engines(settings, Path(directory), settings.shape.dtype)
        for context in settings.contexts:
            if not clock.until(ENGINE):
                record.left_out.append(f"end to end at {context}")
                continue
            record.end_to_end.append(_race(record, engines, context, clock))
            console.print(f"end to end at {context} tokens: done")
        del engines  # and their memory
        _compare_steps(record, Path(directory), clock, console)


def _compare_steps(record: Record, directory: Path, clock: _Clock, console: Console) -> None:
    """Decode steps with CUDA graphs and without."""
    settings, rates = record.settings, record.rates
    assert rates is not None
    if not clock.until(ENGINE):
        record.left_out.append("decode steps with CUDA graphs")
        return
    contexts = [*settings.same, 7, 1]
    check = gpu_graphs.same_tokens(
        directory, settings.device, settings.shape, contexts, settings.decoded
    )
    record.checks.append(check)
    console.print(f"{check.kernel}: {'equal' if check.passed else check.message}")
    engines = gpu_graphs.both(directory, settings.device, settings.shape.dtype)
    for rows in settings.rows:
        if not clock.until(ENGINE):
            record.left_out.append(f"decode steps of {rows} with CUDA graphs")
            continue
        record.steps.append(
            gpu_graphs.time_steps(
                engines,
                settings.shape,
                rows,
                settings.row_context,
                settings.decoded,
                settings.rounds,
                rates.copy_bytes_per_s,
            )
        )
        console.print(f"decode steps of {rows}: done")


def _engines(
    settings: Settings, directory: Path, dtype: torch.dtype
) -> dict[str, TamisOn | TransformersOn]:
    return {
        "tamis": TamisOn(directory, settings.device, dtype),
        "Transformers": TransformersOn(directory, settings.device, dtype),
    }


def _same_tokens(
    settings: Settings, directory: Path, clock: _Clock, left_out: list[str]
) -> Iterator[Check]:
    """Whether both engines generate the same in fp32."""
    engines = _engines(settings, directory, torch.float32)
    for context in settings.same:
        name = f"greedy tokens after {context}"
        if not clock.until(ENGINE):
            left_out.append(name)
            continue
        ids = prompt(settings.shape.vocab, context)
        ours, theirs = (engine.generate(ids, settings.decoded) for engine in engines.values())
        differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
        message = f"{ours} is not {theirs}" if differ else ""
        shape = settings.shape
        group = shape.q_heads // shape.kv_heads
        yield Check(name, "float32", shape.head_dim, group, differ, 0, not differ, message)


def _race(
    record: Record,
    engines: dict[str, TamisOn | TransformersOn],
    context: int,
    clock: _Clock,
) -> EndToEnd:
    settings, rates, shape = record.settings, record.rates, record.settings.shape
    assert rates is not None
    ids = prompt(shape.vocab, context)
    prefill_s: dict[str, list[float]] = {name: [] for name in engines}
    token_s: dict[str, list[float]] = {name: [] for name in engines}

    def sample(name: str) -> None:
        prefill_s[name].append(engines[name].prefill(ids))
        token_s[name].append(engines[name].decode(settings.decoded))

    turns: dict[str, Callable[[], None]] = {
        name: (lambda name=name: sample(name)) for name in engines
    }
    in_turns(turns, 1)  # compiles, and is not counted
    for samples in (*prefill_s.values(), *token_s.values()):
        samples.clear()
    for _ in range(settings.rounds):
        in_turns(turns, 1)
        if not clock.until(ENGINE):
            break
    dtype = str(shape.dtype).removeprefix("torch.")
    return EndToEnd(
        context,
        dtype,
        {name: Spread.of([1e3 * s for s in samples]) for name, samples in prefill_s.items()},
        {name: Spread.of([1e3 * s for s in samples]) for name, samples in token_s.items()},
        1e3 * shape.prefill_flops(context) / rates.matmul_flops[dtype],
        1e3 * shape.decode_bytes(context) / rates.copy_bytes_per_s,
    )
