"""What it costs that requests give way to others: swapping, copies kept or not, or recomputation.

    python benchmarks/preemption.py --threads 2

Requests of as many users take turns under `FairShare`, in memory for some of them. In turns run:
swapping to host memory, where copies of pages outlive the swap and only new pages are copied the
next time (FastSwitch); the same with all copies given up after every step; and recomputation. Then
single swaps are measured against a plain copy of as many bytes. The model has random weights: what
it says does not matter, what it computes does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from random_llama import LlamaShape
from report import Row, save, table
from tamis import SamplingParams
from tamis.cache import CacheLayout, LayerShape, PagedCache
from tamis.cli.machine import measure_rates, this_machine
from tamis.engine.engine import Engine
from tamis.engine.order import FairShare
from tamis.model import Model, load_model
from timing import Spread, in_turns

RESULTS = Path(__file__).parent / "results" / "preemption.json"
KINDS = ("swap, copies kept", "swap, all copied", "recompute")


@dataclass(frozen=True)
class Setting:
    """What runs: a request of `context` tokens of each of `users`, to which `new` are generated, in
    memory for `resident` of them; whoever has had `turn` tokens more than another gives way."""

    users: int
    resident: int
    context: int
    new: int
    turn: int
    page: int = 64


class Turns:
    """One model under one setting."""

    def __init__(self, model: Model, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)
        self._model, self._setting = model, setting
        self._prompts = [
            torch.randint(0, model.vocab_size, (setting.context,), generator=generator).tolist()
            for _ in range(setting.users)
        ]

    def run(self, kind: str) -> dict[str, float]:
        """Answer all requests at once, in a new engine.

        Args:
            kind: one of `KINDS`.

        Returns:
            Generated tokens per second; the 99th percentile and the median of the times between
            tokens of one request, in ms; preemptions; and bytes that each of them copied to host
            memory, in MB.
        """
        engine, setting = self._engine(kind), self._setting
        params = SamplingParams(max_tokens=setting.new, ignore_eos=True)
        for user, prompt in enumerate(self._prompts):
            engine.add_request(prompt, params, user=str(user))
        stats, copies = engine.stats, engine.cache.copies
        seen: defaultdict[str, list[float]] = defaultdict(list)
        began = time.perf_counter()
        while not engine.idle:
            for increment in engine.step():
                seen[increment.request_id].append(time.perf_counter())
            if kind == "swap, all copied":
                copies.clear()
        seconds = time.perf_counter() - began
        gaps = [b - a for times in seen.values() for a, b in pairwise(times)]
        preemptions = max(1, stats.preemptions)
        return {
            "tokens_s": setting.users * setting.new / seconds,
            "p99_ms": 1e3 * statistics.quantiles(gaps, n=100, method="inclusive")[98],
            "median_ms": 1e3 * statistics.median(gaps),
            "preemptions": stats.preemptions,
            "copied_mb": copies.copied_bytes / preemptions / 1e6,
        }

    def _engine(self, kind: str) -> Engine:
        setting = self._setting
        one = setting.context + setting.new + 2 * setting.page  # with what is reserved
        layout = page_layout(self._model, setting.page)
        swaps = kind != "recompute"
        return Engine(
            self._model,
            kv_bytes=layout.capacity_for(layout.peak_pages(setting.resident * one)),
            page_size=setting.page,
            preemption="swap" if swaps else "recompute",
            swap_bytes=layout.capacity_for(layout.peak_pages(setting.users * one)) * swaps,
            order=FairShare(output_weight=256, quantum=256 * setting.turn),
        )


def page_layout(model: Model, page: int) -> CacheLayout:
    """The pages of a model's KV."""
    layers = (LayerShape(s.kv_heads, s.k_dim, s.v_dim, s.window) for s in model.layers)
    return CacheLayout(tuple(layers), page, model.dtype)


def swap_rows(model: Model, n_tokens: int, repeats: int, page: int = 64) -> list[Row]:
    """What it takes to swap a sequence of `n_tokens` tokens, each beside a plain copy of all its
    bytes to memory that has been written before."""
    layout = page_layout(model, page)
    memory = layout.capacity_for(layout.peak_pages(n_tokens + page * (repeats + 1)))
    cache = PagedCache(layout, memory, swap_bytes=memory)
    cache.arena.data.zero_()
    sequence = cache.new_sequence()
    sequence.reserve(n_tokens)
    sequence.advance(n_tokens)
    source, target = (np.ones(sequence.bytes, dtype=np.uint8) for _ in range(2))
    taken: defaultdict[str, list[float]] = defaultdict(list)

    def timed(name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        taken[name].append(1e3 * (time.perf_counter() - start))

    sequence.swap_out()  # the system commits the memory
    sequence.swap_in()
    for _ in range(repeats):
        cache.copies.clear()
        timed("plain", lambda: np.copyto(target, source))
        timed("out, all of it", sequence.swap_out)
        timed("in", sequence.swap_in)
        sequence.reserve(page)
        sequence.advance(page)
        timed(f"out again after {page} tokens", sequence.swap_out)
        sequence.swap_in()
    plain = Spread.of(taken.pop("plain"))
    size = f"{n_tokens:,} tokens, {source.size / 1e6:.0f} MB"
    return [Row(f"{size}: {name}", "ms", Spread.of(ms), plain) for name, ms in taken.items()]


def rows(samples: Mapping[str, Sequence[dict[str, float]]]) -> list[Row]:
    """What the runs of each kind say, each beside recomputation."""

    def row(kind: str, name: str, unit: str, key: str, *, higher: bool = False) -> Row:
        ours, theirs = (Spread.of([run[key] for run in samples[k]]) for k in (kind, "recompute"))
        compared = theirs if theirs.median else None  # recomputation copies nothing
        return Row(f"{kind}: {name}", unit, ours, compared, higher_is_better=higher)

    return [
        one
        for kind in KINDS[:2]
        for one in (
            row(kind, "throughput", "tokens/s", "tokens_s", higher=True),
            row(kind, "between tokens, 99th percentile", "ms", "p99_ms"),
            row(kind, "between tokens, median", "ms", "median_ms"),
            row(kind, "preemptions", "", "preemptions"),
            row(kind, "copied at each", "MB", "copied_mb"),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory; by default a random 27M Llama")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--resident", type=int, default=2, help="requests that memory holds")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--turn", type=int, default=16, help="tokens before one gives way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting(args.users, args.resident, args.context, args.new, args.turn)
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or Path(folder)
        if args.model is None:
            LlamaShape().save(directory)
        model = load_model(directory, dtype="auto", device="cpu")
        rates = measure_rates()
        turns = Turns(model, setting)
        turns.run(KINDS[0])  # warm
        samples = in_turns({kind: partial(turns.run, kind) for kind in KINDS}, args.rounds)
        single = swap_rows(model, 2 * args.context, repeats=9)
    report = rows(samples)
    console = Console(width=140, highlight=False)
    console.print(table(report, "recompute"))
    console.print(table(single, "plain copy"))
    settings = asdict(setting) | {
        "rounds": args.rounds,
        "model": str(args.model) if args.model else asdict(LlamaShape()),
        "threads": args.threads,
    }
    save(args.json, "preemption", this_machine(), rates, settings, [*report, *single])
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
