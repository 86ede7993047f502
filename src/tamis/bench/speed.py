"""Time and memory: one request at a time, every plan in the same rounds as exact attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from tamis.bench.results import ResultFile, Timing
from tamis.engine.outputs import RequestMetrics
from tamis.errors import ConfigError, RequestError
from tamis.llm import LLM
from tamis.plan import Plan
from tamis.sampling import SamplingParams

DENSE = "dense"
_WARM_UP = 64


@dataclass(frozen=True)
class SpeedWork:
    """What is to be timed.

    Attributes:
        plans: by the name they have in results.
        lengths: tokens of the prompts. `repeat`: rounds at each length.
        new_tokens: tokens generated after each prompt.
        text: what prompts are cut from, repeated where it is too short.
        done: keys of the timings that are already there.
    """

    plans: dict[str, Plan]
    lengths: Sequence[int]
    repeat: int
    new_tokens: int
    text: str
    done: frozenset[tuple[object, ...]]

    def check(self, llm: LLM) -> None:
        """Raise ConfigError if a prompt with its new tokens is longer than the model's context."""
        for length in self.lengths:
            if length + self.new_tokens > llm.model.max_length:
                raise ConfigError(
                    f"timing {length:,} tokens and {self.new_tokens} new ones needs more than the "
                    f"model's context of {llm.model.max_length:,}; give shorter --lengths, or "
                    "--no-speed"
                )

    @property
    def rounds(self) -> list[tuple[int, int, list[str]]]:
        """Length, repeat, and the plans still to be timed there; complete rounds are left out."""
        found = []
        for length in self.lengths:
            for repeat in range(self.repeat):
                left = [p for p in self.plans if (p, length, repeat) not in self.done]
                if left:
                    found.append((length, repeat, left))
        return found

    @property
    def tokens(self) -> int:
        """Prompt tokens of all rounds, the baseline's included."""
        return sum(length * len({DENSE, *left}) for length, _, left in self.rounds)


@dataclass(frozen=True)
class _Run:
    metrics: RequestMetrics
    timeline: list[tuple[float, int]]

    @property
    def ttft_s(self) -> float:
        assert self.metrics.ttft_s is not None
        return self.metrics.ttft_s

    @property
    def tpot_s(self) -> float:
        assert self.metrics.tpot_s is not None
        return self.metrics.tpot_s


def run_timings(
    llm: LLM, work: SpeedWork, file: ResultFile[Timing], advance: Callable[[int], None]
) -> None:
    """Time what is left, round by round: exact attention first, then each plan.

    Args:
        file: gets a timing per plan and round.
        advance: called with the prompt tokens of each request that was timed.

    Raises:
        RequestError: a request failed.
    """
    for plan in {DENSE: Plan.parse(DENSE), **work.plans}.values() if work.rounds else ():
        _run(llm, _prompt(llm, work.text, _WARM_UP, 0), 2, plan)
    for length, repeat, left in work.rounds:
        prompt = _prompt(llm, work.text, length, repeat)
        dense = _run(llm, prompt, work.new_tokens, Plan.parse(DENSE))
        advance(length)
        for name in left:
            run = dense
            if name != DENSE:
                run = _run(llm, prompt, work.new_tokens, work.plans[name])
                advance(length)
            file.append(_timing(name, length, repeat, run, dense))


def _run(llm: LLM, prompt: list[int], new_tokens: int, plan: Plan) -> _Run:
    """One request alone in the engine, its KV bytes read after every step."""
    engine = llm.engine
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    name = engine.add_request(prompt, params, plan)
    timeline = [(0.0, engine.cache.bytes_in_use)]
    try:
        while True:
            increments = engine.step()
            output = next((i.output for i in increments if i.output is not None), None)
            if output is None:
                timeline.append((time.perf_counter() - start, engine.cache.bytes_in_use))
                continue
            if output.finish_reason == "error":
                raise RequestError(f"a timed request with plan {plan} failed: {output.error}")
            # Its pages were freed with its last token; the request knows what they took.
            timeline.append((time.perf_counter() - start, output.metrics.kv_bytes))
            return _Run(output.metrics, timeline)
    finally:
        engine.abort(name)


def _timing(plan: str, length: int, repeat: int, run: _Run, dense: _Run) -> Timing:
    return Timing(
        plan=plan,
        length=length,
        repeat=repeat,
        output_tokens=run.metrics.output_tokens,
        ttft_s=run.ttft_s,
        tpot_s=run.tpot_s,
        dense_ttft_s=dense.ttft_s,
        dense_tpot_s=dense.tpot_s,
        kv_bytes=run.metrics.kv_bytes,
        kv_bytes_peak=run.metrics.kv_bytes_peak,
        kv_bytes_dense=run.metrics.kv_bytes_dense,
        timeline=[(round(seconds, 6), size) for seconds, size in run.timeline],
    )


def _prompt(llm: LLM, text: str, length: int, repeat: int) -> list[int]:
    """`length` tokens of the text, another stretch of it in each round."""
    ids: list[int] = []
    for piece in _pieces(text, repeat):
        ids += llm.encode(piece)
        if len(ids) >= length:
            break
    return ids[:length]


def _pieces(text: str, repeat: int) -> Iterator[str]:
    """Stretches of the text without end, going round."""
    size = 65536
    for i in count():
        start = ((repeat * 16 + i) * size) % max(1, len(text) - size)
        yield text[start : start + size]
