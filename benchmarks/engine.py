"""The engine against 🤗 Transformers on this machine, and against what the machine allows.

    python benchmarks/engine.py            # minutes on two cores; writes results/engine.json
    python benchmarks/engine.py --quick    # small sizes, under a minute: whether it runs at all

Both run the same Llama of random weights in bf16, in turns (A B A B ...), so that what else the
machine does meets both. The table shows medians, with the least and the greatest in brackets. The
limits are bytes that must be read over the read bandwidth, and operations that must be done over
the matmul rate, both measured in the same run. (Weights that stay in the processor's cache are
read faster than that, so short contexts can come out beyond it.)
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from contestants import Contestant, Crowd, OneByOne, Throughput
from contestants_tamis import Tamis
from contestants_transformers import Transformers
from memory import peak_growth
from random_llama import LlamaShape
from report import Row, Target, best_rates, number, save, table
from tamis.cli.machine import Rates, measure_rates, this_machine
from tamis.cli.terminal import quiet_logs
from timing import Spread, in_turns

RESULTS = Path(__file__).parent / "results" / "engine.json"
OURS, THEIRS = "tamis", "Transformers"
MIB = 1 << 20
POSITION_BYTES = 4
"""Of each cached token, beside its key and value: tamis keeps its absolute position."""
_WARM_UP = 64
_FILE_WIDTH = 150


@dataclass(frozen=True)
class Settings:
    """What is measured; by default at the sizes that the targets are meant for.

    Attributes:
        shape: the model.
        contexts: prompt lengths of one request, ascending, in tokens.
        once_from: from this length on, a prompt is computed only once by each engine.
        decode_tokens: tokens per sample of decoding.
        requests, request_tokens, new_tokens: the requests that run at once.
        repeat: samples of everything else.
        threads: torch's threads.
        judged: whether targets are judged.
    """

    shape: LlamaShape = field(default_factory=LlamaShape)
    contexts: tuple[int, ...] = (2048, 8192, 32_768)
    once_from: int = 32_768
    decode_tokens: int = 32
    requests: int = 8
    request_tokens: int = 2048
    new_tokens: int = 256
    repeat: int = 3
    threads: int = 2
    judged: bool = True

    def quick(self) -> Settings:
        """The same at sizes that take seconds and prove nothing."""
        return replace(
            self,
            contexts=(256, 1024),
            decode_tokens=8,
            request_tokens=256,
            new_tokens=24,
            judged=False,
        )

    def target(
        self, bound: float, *, at_least: bool = False, of_ratio: bool = True
    ) -> Target | None:
        """A target, where targets are judged."""
        return Target(bound, at_least, of_ratio) if self.judged else None


@dataclass(frozen=True)
class Series:
    """What was measured of one request of `context` prompt tokens, by contestant.

    Attributes:
        prefill_s, decode_s: seconds per prompt and per token.
        kv_tokens, kv_bytes: tokens cached in the end, and what they take.
    """

    context: int
    prefill_s: dict[str, list[float]]
    decode_s: dict[str, list[float]]
    kv_tokens: int
    kv_bytes: dict[str, int]


@dataclass(frozen=True)
class Measured:
    """Everything that was measured.

    Attributes:
        rates: the machine's, the best of before and after.
        series: one per context.
        throughput: of several requests, by contestant.
        peak_bytes: growth of resident memory by the longest context, where the system tells.
        page_size: tamis's tokens per page.
    """

    rates: Rates
    series: list[Series]
    throughput: dict[str, list[Throughput]]
    peak_bytes: dict[str, int | None]
    page_size: int


def measure(settings: Settings, console: Console) -> Measured:
    """Run everything; `console` is told what runs and how long it took."""
    source = random.Random(0)

    def prompt(n_tokens: int) -> list[int]:
        return source.choices(range(settings.shape.vocab), k=n_tokens)

    with tempfile.TemporaryDirectory(prefix="tamis-bench-") as scratch:
        directory = Path(scratch)
        settings.shape.save(directory)
        with _step(console, "the machine's rates"):
            rates = [measure_rates()]
        tamis, transformers = Tamis(directory), Transformers(directory)
        for contestant in (tamis, transformers):
            contestant.prefill(prompt(_WARM_UP))
            contestant.decode(2)
        series = []
        for n_tokens in settings.contexts:
            with _step(console, f"one request of {n_tokens:,} tokens"):
                series.append(_one_request(settings, prompt(n_tokens), tamis, transformers))
        with _step(console, f"{settings.requests} requests, at once and one by one"):
            prompts = [prompt(settings.request_tokens) for _ in range(settings.requests)]
            contestants: dict[str, Crowd] = {OURS: tamis, THEIRS: OneByOne(transformers)}
            throughput = in_turns(
                {
                    n: partial(c.answer, prompts, settings.new_tokens)
                    for n, c in contestants.items()
                },
                settings.repeat,
            )
        with _step(console, "peak memory, in processes of their own"):
            ids = prompt(settings.contexts[-1])
            peak_bytes = {
                name: peak_growth(kind, directory, ids, settings.decode_tokens, settings.threads)
                for name, kind in ((OURS, Tamis), (THEIRS, Transformers))
            }
        with _step(console, "the machine's rates again"):
            rates.append(measure_rates())
    return Measured(best_rates(rates), series, throughput, peak_bytes, tamis.page_size)


def _one_request(
    settings: Settings, prompt: list[int], tamis: Tamis, transformers: Transformers
) -> Series:
    pair: dict[str, Contestant] = {OURS: tamis, THEIRS: transformers}
    once = len(prompt) >= settings.once_from
    prefill_s = in_turns(
        {name: partial(one.prefill, prompt) for name, one in pair.items()},
        1 if once else settings.repeat,
    )
    decode_s = in_turns(
        {name: partial(one.decode, settings.decode_tokens) for name, one in pair.items()},
        settings.repeat,
    )
    return Series(
        context=len(prompt),
        prefill_s=prefill_s,
        decode_s=decode_s,
        kv_tokens=len(prompt) + settings.repeat * settings.decode_tokens,
        kv_bytes={name: one.kv_bytes for name, one in pair.items()},
    )


def rows(settings: Settings, measured: Measured) -> list[Row]:
    """Every line of the report."""
    shape, rates = settings.shape, measured.rates
    *_, longest = measured.series
    prefill = [
        Row(
            f"prefill of {s.context:,} tokens",
            "s",
            *_pair(s.prefill_s),
            limit=shape.prefill_flops(s.context) / rates.matmul_bf16_flops,
        )
        for s in measured.series
    ]
    decode = [
        Row(
            f"decode after {s.context:,} tokens",
            "ms/token",
            *_pair(s.decode_s, 1e3),
            limit=1e3 * shape.decode_bytes(s.context) / rates.read_bytes_per_s,
            target=settings.target(0.30) if s is longest else None,
        )
        for s in measured.series
    ]
    return [*prefill, *decode, *_crowd_rows(settings, measured), *_memory_rows(settings, measured)]


def _crowd_rows(settings: Settings, measured: Measured) -> list[Row]:
    """Of several requests at once, against one by one."""
    shape, rates, n = settings.shape, measured.rates, settings.requests
    ours, theirs = measured.throughput[OURS], measured.throughput[THEIRS]
    context = settings.request_tokens + settings.new_tokens // 2  # on average
    step_s = shape.decode_bytes(context, n) / rates.read_bytes_per_s
    prompts_s = n * shape.prefill_flops(settings.request_tokens) / rates.matmul_bf16_flops
    name = f"{n} requests of {settings.request_tokens:,} + {settings.new_tokens} tokens"
    return [
        Row(
            name,
            "tokens/s",
            Spread.of([t.tokens_per_s for t in ours]),
            Spread.of([t.tokens_per_s for t in theirs]),
            limit=n * settings.new_tokens / (prompts_s + settings.new_tokens * step_s),
            target=settings.target(4, at_least=True),
            higher_is_better=True,
        ),
        Row(
            f"{name}, decode alone",
            "tokens/s",
            Spread.of([t.decode_tokens_per_s for t in ours]),
            Spread.of([t.decode_tokens_per_s for t in theirs]),
            limit=n / step_s,
            higher_is_better=True,
        ),
        Row(
            f"outside the model's forward, {n} requests decoding",
            "% of a step",
            Spread.of([100 * t.overhead for t in ours if t.overhead is not None]),
            target=settings.target(10, of_ratio=False),
        ),
    ]


def _memory_rows(settings: Settings, measured: Measured) -> list[Row]:
    """Of the longest context."""
    shape, page_size = settings.shape, measured.page_size
    *_, longest = measured.series
    heads = shape.layers * shape.kv_heads
    # The formula: so many tokens in each KV head of each layer, in pages of page_size tokens.
    per_token = shape.kv_bytes(1) / heads + POSITION_BYTES
    beyond = (
        longest.kv_bytes[OURS] / heads / (page_size * per_token) - longest.kv_tokens / page_size
    )
    result = [
        Row(
            f"KV cache of {longest.kv_tokens:,} tokens",
            "MiB",
            Spread.of([longest.kv_bytes[OURS] / MIB]),
            Spread.of([longest.kv_bytes[THEIRS] / MIB]),
            limit=shape.kv_bytes(longest.kv_tokens) / MIB,
        ),
        Row(
            "KV pool beyond the formula",
            "pages per head",
            Spread.of([abs(beyond)]),
            target=Target(1, of_ratio=False),
        ),
    ]
    ours, theirs = measured.peak_bytes[OURS], measured.peak_bytes[THEIRS]
    if ours is not None and theirs is not None:
        result.append(
            Row(
                f"memory growth by {longest.context:,} tokens, peak",
                "MiB",
                Spread.of([ours / MIB]),
                Spread.of([theirs / MIB]),
                limit=shape.kv_bytes(longest.context + settings.decode_tokens) / MIB,
            )
        )
    return result


def _pair(samples: dict[str, list[float]], scale: float = 1.0) -> tuple[Spread, Spread]:
    ours, theirs = (Spread.of([scale * x for x in samples[name]]) for name in (OURS, THEIRS))
    return ours, theirs


@contextmanager
def _step(console: Console, name: str) -> Iterator[None]:
    """Says what runs while it runs, and how long it took."""
    start = time.perf_counter()
    with console.status(name):
        yield
    console.print(f"{name}: {time.perf_counter() - start:.0f} s")


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, under a minute; no target is judged.")
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Samples of each, in turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and the kernels.")] = 2,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help=f"Where the results go; by default {RESULTS.name}."
        ),
    ] = None,
) -> None:
    """Measure the engine against 🤗 Transformers and against the machine's limits."""
    quiet_logs(debug=False)
    torch.set_num_threads(threads)
    settings = Settings(repeat=repeat, threads=threads)
    if quick:
        settings = settings.quick()
    measured = measure(settings, Console(stderr=True, highlight=False))
    report = rows(settings, measured)
    machine, rates = this_machine(), measured.rates

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(
        f"{machine.cpu}, {machine.threads} threads, torch {machine.torch}; attention: "
        f"{'native' if machine.backends['native'] else 'torch'}; "
        f"{settings.shape.parameters / 1e6:.1f} M parameters in bf16\n"
        f"measured: reads {number(rates.read_bytes_per_s / 1e9)} GB/s, "
        f"bf16 matmul {number(rates.matmul_bf16_flops / 1e9)} GFLOP/s",
        soft_wrap=True,
    )
    console.print(table(report, THEIRS))
    if quick:
        console.print("Small sizes: these numbers show that it runs, and nothing else.")
    target = json_file or (None if quick else RESULTS)
    if target is not None:
        save(target, "engine", machine, rates, asdict(settings), report)
        console.print(f"written to {target}")


if __name__ == "__main__":
    typer.run(main)
