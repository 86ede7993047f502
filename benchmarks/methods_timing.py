"""Time and memory of a plan, its decode steps in turns with those of exact attention."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from methods_plans import DENSE
from random_llama import LlamaShape
from tamis import LLM, SamplingParams
from tamis.bench.results import Timing
from tamis.engine.outputs import RequestMetrics
from tamis.errors import RequestError
from tamis.model import load_model
from tamis.plan import Plan
from tamis.train.methods.save import save

SHORT = 1024
"""Tokens of the short prompt that is decoded beside every plan, by default."""
_TURN = 8  # steps of one request before it is the next one's turn
_WARM_UP = 64
_KV_MEMORY = "1GiB"
_FITTED = {"duoattention": ("gates",), "razorattention": ("induction", "echo")}


@dataclass(frozen=True)
class Case:
    """How prompts of one length are timed.

    Attributes:
        length: of the prompt, in tokens. `rounds`: so often, each with another prompt.
        new_tokens: generated after it, at least 3.
        exact_every: so many plans share one prompt that exact attention computed; each still
            decodes in turns with it.
        patience_s: seconds of decoding after which a plan need not generate the rest.
    """

    length: int
    rounds: int
    new_tokens: int
    exact_every: int = 1
    patience_s: float = 30.0


@dataclass(frozen=True)
class Round(Timing):
    """A plan at one length, and exact attention beside it.

    `tpot_s` and `dense_tpot_s` are medians over the decode steps, by the tokens of a step where a
    draft gives several; `timeline` counts only the request's own seconds.

    Attributes:
        short_tpot_s: seconds per token of exact attention after a short prompt.
    """

    short_tpot_s: float


class Request:
    """One request that has an engine to itself and is taken on step by step.

    Attributes:
        ttft_s: seconds until its first token.
        timeline: after every step of the engine, its seconds so far and its bytes of KV pages.
        metrics: what it cost; None until it has ended.
    """

    def __init__(self, llm: LLM, prompt: Sequence[int], plan: Plan, new_tokens: int) -> None:
        self._engine = llm.engine
        self._plan = plan
        self._steps: list[tuple[float, int]] = []  # seconds and tokens of each decode step
        self.timeline: list[tuple[float, int]] = []
        self.metrics: RequestMetrics | None = None
        self._elapsed = 0.0
        start = time.perf_counter()
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        self._name = self._engine.add_request(prompt, params, plan)
        self._elapsed = time.perf_counter() - start
        self._next()
        self.ttft_s = self._elapsed

    def start_over(self) -> None:
        """Let `tpot_s` be of the steps from here on."""
        self._steps = []

    def decode(self, n_steps: int) -> None:
        """Take it on by so many steps that give tokens, or to its end.

        Raises:
            RequestError: it failed.
        """
        for _ in range(n_steps):
            if self.metrics is None:
                self._steps.append(self._next())

    def stop(self) -> None:
        """End it here."""
        for increment in self._engine.abort(self._name):
            if increment.output is not None:
                self.metrics = increment.output.metrics

    close = stop  # frees its pages, wherever it is

    @property
    def decoding_s(self) -> float:
        """Seconds of the steps that `tpot_s` is of."""
        return sum(took for took, _ in self._steps)

    @property
    def tpot_s(self) -> float:
        """Seconds of the median step by the tokens of the mean one."""
        seconds, tokens = zip(*self._steps, strict=True)
        return float(median(seconds) / fmean(tokens))

    def _next(self) -> tuple[float, int]:
        """Run the engine until the request has more tokens: the seconds, and how many."""
        took, tokens = 0.0, 0
        while not tokens and self.metrics is None:
            start = time.perf_counter()
            increments = self._engine.step()
            took += time.perf_counter() - start
            for increment in increments:
                if increment.error is not None:
                    raise RequestError(
                        f"a request with plan {self._plan} failed: {increment.error}"
                    )
                tokens += len(increment.token_ids)
                if increment.output is not None:
                    self.metrics = increment.output.metrics
            held = self._engine.cache.bytes_in_use
            if self.metrics is not None:
                held = self.metrics.kv_bytes  # its pages were freed with its last token
            self.timeline.append((round(self._elapsed + took, 6), held))
        self._elapsed += took
        return took, tokens


class Bench:
    """A model of random weights, in bf16, with an engine each for the plan, for exact attention,
    and for exact attention after a short prompt.

    Args:
        shape: of the model; directory: where it is written, its heads fitted at random.
        short: tokens of the short prompt.
    """

    def __init__(self, shape: LlamaShape, directory: Path, short: int = SHORT) -> None:
        self.shape = shape
        self.short = short
        shape.save(directory)
        _fit_at_random(shape, directory)
        model = load_model(directory, dtype="bfloat16", device="cpu")
        self._planned, self._dense, self._short = (
            LLM(model, kv_memory=_KV_MEMORY) for _ in range(3)
        )
        self._exact: Request | None = None  # with `_exact_of`, what it is the request of
        self._exact_of: tuple[Case, int] | None = None
        self._uses = 0
        self._tokens = random.Random(0)

    def warm_up(self, plan: str) -> None:
        """Run a few tokens of a plan, so that no round pays for what is only done once.

        Raises:
            PlanError, RequestError: the plan cannot run.
        """
        places = ((self._planned, plan), (self._dense, DENSE), (self._short, DENSE))
        for llm, its_plan in places:
            with closing(Request(llm, self._prompt(_WARM_UP), Plan.parse(its_plan), 3)) as request:
                request.decode(3)

    def compare(self, plan: str, case: Case, repeat: int) -> Round:
        """Time a plan after a prompt of random tokens.

        Exact attention's prompt is computed before or after the plan's by turns of `repeat`, or was
        computed for an earlier plan; then all requests decode in turns, `_TURN` steps each.

        Raises:
            PlanError, RequestError: the plan cannot run.
        """
        if repeat % 2 == 0:
            self._renew_exact(case, repeat)
        try:
            with (
                closing(self._begin(self._planned, plan, case.length, case.new_tokens)) as run,
                closing(self._begin(self._short, DENSE, self.short, case.new_tokens)) as short,
            ):
                exact = self._renew_exact(case, repeat)
                while run.metrics is None:
                    for request in (short, exact, run):
                        request.decode(_TURN)
                    if run.decoding_s > case.patience_s:
                        run.stop()
        finally:
            self._uses += 1
            if self._uses >= case.exact_every:
                self._drop_exact()
        return Round(
            plan=plan,
            length=case.length,
            repeat=repeat,
            output_tokens=run.metrics.output_tokens,
            ttft_s=run.ttft_s,
            tpot_s=run.tpot_s,
            dense_ttft_s=exact.ttft_s,
            dense_tpot_s=exact.tpot_s,
            kv_bytes=run.metrics.kv_bytes,
            kv_bytes_peak=run.metrics.kv_bytes_peak,
            kv_bytes_dense=run.metrics.kv_bytes_dense,
            timeline=run.timeline,
            short_tpot_s=short.tpot_s,
        )

    def _renew_exact(self, case: Case, repeat: int) -> Request:
        """Exact attention's request of this case and round, begun unless it is there."""
        if self._exact is None or self._exact_of != (case, repeat):
            self._drop_exact()
            steps = case.exact_every * (case.new_tokens + _TURN)  # it must outlast all plans
            self._exact = self._begin(self._dense, DENSE, case.length, steps)
            self._exact_of = (case, repeat)
        self._exact.start_over()
        return self._exact

    def _drop_exact(self) -> None:
        if self._exact is not None:
            self._exact.close()
        self._exact, self._exact_of, self._uses = None, None, 0

    def _begin(self, llm: LLM, plan: str, length: int, new_tokens: int) -> Request:
        return Request(llm, self._prompt(length), Plan.parse(plan), new_tokens)

    def _prompt(self, length: int) -> list[int]:
        """No two are alike, so that nothing is there already."""
        return self._tokens.choices(range(self.shape.vocab), k=length)


def _fit_at_random(shape: LlamaShape, directory: Path) -> None:
    """Write what `tamis train` would: random weights have no heads that are worth a search."""
    generator = torch.Generator().manual_seed(0)
    for method, names in _FITTED.items():
        size = (shape.layers, shape.kv_heads)
        scores = {name: torch.rand(size, generator=generator) for name in names}
        save(scores, directory / "tamis", method, {"scores": "random"})
