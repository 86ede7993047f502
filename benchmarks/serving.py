"""The time between tokens while a long prompt comes in, with and without a steady pace.

    python benchmarks/serving.py --threads 2

Some requests decode; then a long prompt joins them. What is measured is the time between tokens
of those that decode, before and while the prompt is computed: at a pace that keeps answers steady
(`Steady`, what `tamis serve` does), and with all of a prompt that fits into a step (`Full`, the
most tokens per second). The two run in turns. The model has random weights: what it says does not
matter, what it computes does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from random_llama import LlamaShape
from report import Row, Target, save, table
from tamis import SamplingParams
from tamis.cli.machine import measure_rates, this_machine
from tamis.engine.engine import Engine
from tamis.engine.pace import Full, Pace, Steady
from tamis.model import Model, load_model
from timing import Spread, in_turns

RESULTS = Path(__file__).parent / "results" / "serving.json"
MOST = 2.5
"""Times as slow as undisturbed that half of the times between tokens may be at the most."""


@dataclass(frozen=True)
class Setting:
    """What runs: `decodes` requests with a context of `context` tokens, and a prompt of `prompt`
    tokens that joins them after `undisturbed` steps; steps of at most `step` tokens."""

    decodes: int
    context: int
    prompt: int
    undisturbed: int
    step: int


Samples = Sequence[dict[str, float]]
"""Of one pace, a run each; see `Disturbance.run`."""


class Disturbance:
    """One model under one setting."""

    def __init__(self, model: Model, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(n: int) -> list[int]:
            return torch.randint(0, model.vocab_size, (n,), generator=generator).tolist()

        self._model, self._setting = model, setting
        self._contexts = [draw(setting.context) for _ in range(setting.decodes)]
        self._prompt = draw(setting.prompt)

    def run(self, pace: Pace) -> dict[str, float]:
        """Time between tokens, in ms, before and while the prompt is computed, the prompt's time to
        its first token, in s, and how many times as slow answers are meanwhile: the median, the
        95th percentile and the longest of the times against the undisturbed median."""
        setting = self._setting
        n_tokens = setting.decodes * (2 * setting.context + setting.prompt) + setting.prompt
        kv_bytes = n_tokens * self._model.kv_bytes_per_token + (256 << 20)
        engine = Engine(self._model, kv_bytes=kv_bytes, max_batch_tokens=setting.step)
        endless = SamplingParams(max_tokens=setting.context + setting.prompt, ignore_eos=True)
        for context in self._contexts:
            engine.add_request(context, endless)
        while any(s.in_prompt for s in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        engine.scheduler.pace = pace  # from here on: the contexts are as long under each
        before = [_step_s(engine) for _ in range(setting.undisturbed)]
        began = time.perf_counter()
        engine.add_request(self._prompt, SamplingParams(max_tokens=1), request_id="long")
        during = []
        ended = False
        while not ended:
            start = time.perf_counter()
            ended = any(i.request_id == "long" for i in engine.step())
            during.append(time.perf_counter() - start)
        calm = statistics.median(before)
        return {
            "undisturbed_ms": 1e3 * calm,
            "disturbed_ms": 1e3 * statistics.median(during),
            "steps": len(during),
            "first_s": time.perf_counter() - began,
            "median": statistics.median(during) / calm,
            "p95": _percentile(during, 95) / calm,
            "longest": max(during) / calm,
        }


def _step_s(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _percentile(times: Sequence[float], percent: int) -> float:
    if len(times) < 2:
        return times[0]
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def rows(n: int, steady: Samples, full: Samples) -> list[Row]:
    """What the runs with `n` decoding requests say, at a steady pace and with full steps."""

    def row(name: str, unit: str, key: str, target: Target | None = None) -> Row:
        ours, theirs = (Spread.of([run[key] for run in runs]) for runs in (steady, full))
        return Row(f"{n} answers, {name}", unit, ours, theirs, target=target)

    at_most = Target(MOST, of_ratio=False)
    return [
        row("between tokens, undisturbed", "ms", "undisturbed_ms"),
        row("between tokens beside the prompt", "ms", "disturbed_ms"),
        row("beside it, of undisturbed: median", "x", "median", at_most),
        row("95th percentile", "x", "p95"),
        row("longest", "x", "longest"),
        row("the prompt's first token", "s", "first_s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory; by default a random 27M Llama")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--decodes", type=int, nargs="+", default=[4, 16], help="requests that decode"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens of each of them")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the one that joins")
    parser.add_argument("--step", type=int, default=2048, help="max_batch_tokens")
    parser.add_argument("--slowdown", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = [Setting(n, args.context, args.prompt, 100, args.step) for n in args.decodes]
    report: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or Path(folder)
        if args.model is None:
            LlamaShape().save(directory)
        model = load_model(directory, dtype="auto", device="cpu")
        rates = measure_rates()
        for setting in settings:
            disturbance = Disturbance(model, setting)
            runs = {
                "steady": partial(disturbance.run, Steady(args.slowdown)),
                "full": partial(disturbance.run, Full()),
            }
            disturbance.run(Full())  # warm
            samples = in_turns(runs, args.rounds)
            report += rows(setting.decodes, samples["steady"], samples["full"])
    console = Console(width=120, highlight=False)
    console.print(table(report, "full steps"))
    its_settings = {
        "slowdown": args.slowdown,
        "rounds": args.rounds,
        "runs": [asdict(setting) for setting in settings],
        "model": str(args.model) if args.model else asdict(LlamaShape()),
        "threads": args.threads,
    }
    save(args.json, "serving", this_machine(), rates, its_settings, report)
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
