"""tamis, through its public API."""

from __future__ import annotations

import cProfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from contestants import Throughput
from tamis import LLM, SamplingParams
from tamis.engine.outputs import Increment

KV_MEMORY = "1GiB"
"""Room for the longest prompt and for all concurrent ones; only pages in use are ever committed."""


class Tamis:
    """tamis in bf16, with its default settings.

    Args:
        directory: the model.
        plan: of every request.
        weights: what those of linear layers are kept in, as for `LLM`.
    """

    def __init__(self, directory: Path, plan: str = "dense", weights: str | None = None) -> None:
        self.llm = LLM(
            directory,
            plan=plan,
            dtype="bfloat16",
            device="cpu",
            weights=weights,
            kv_memory=KV_MEMORY,
        )
        self._stream: Iterator[Increment] | None = None

    def prefill(self, prompt: Sequence[int]) -> float:
        """As `Contestant.prefill`."""
        self._stream = None  # ends the sequence before
        start = time.perf_counter()
        self._stream = self.llm.stream(prompt, SamplingParams(max_tokens=None, ignore_eos=True))
        _check(next(self._stream))
        return time.perf_counter() - start

    def decode(self, n_tokens: int) -> float:
        """As `Contestant.decode`."""
        assert self._stream is not None
        start = time.perf_counter()
        for _ in range(n_tokens):
            _check(next(self._stream))
        return (time.perf_counter() - start) / n_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages in use."""
        return self.llm.engine.cache.bytes_in_use

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.llm.engine.layout.page_size

    def profile(self, n_tokens: int) -> dict[str, float]:
        """Where the time of decoding goes: seconds per token in "linear layers", with what is fused
        to them, "attention" and "all else", of `n_tokens` more tokens. The profiler slows what is
        "all else" down."""
        profiler = cProfile.Profile()
        profiler.runcall(self.decode, n_tokens)
        parts = dict.fromkeys(("linear layers", "attention", "all else"), 0.0)
        for entry in profiler.getstats():
            file = getattr(entry.code, "co_filename", "")
            parts[_part_of(file)] += entry.inlinetime / n_tokens
        return parts

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """As `Crowd.answer`, all at once.

        Raises:
            RuntimeError: a request failed, or never did all of them decode in one step.
        """
        self._stream = None
        engine, stats = self.llm.engine, self.llm.engine.stats
        params = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
        for prompt in prompts:
            engine.add_request(prompt, params, self.llm.plan)
        steps = decode_s = forward_s = 0.0
        start = time.perf_counter()
        while not engine.idle:
            before = stats.prefill_tokens, stats.step_s, stats.forward_s
            increments = engine.step()
            for increment in increments:
                _check(increment)
            if len(increments) == len(prompts) and stats.prefill_tokens == before[0]:
                steps += 1
                decode_s += stats.step_s - before[1]
                forward_s += stats.forward_s - before[2]
        took = time.perf_counter() - start
        if not steps:
            raise RuntimeError("the requests were never all decoding at once: generate more tokens")
        return Throughput(
            tokens_per_s=len(prompts) * n_tokens / took,
            decode_tokens_per_s=len(prompts) * steps / decode_s,
            overhead=1 - forward_s / decode_s,
        )


def _part_of(file: str) -> str:
    """The part of a step that time spent in a Python file belongs to."""
    if file.endswith(("tamis/model/linear.py", "tamis/model/fused.py")):
        return "linear layers"
    return "attention" if "tamis/attention/" in file else "all else"


def _check(increment: Increment) -> None:
    """Raise RuntimeError if the request failed."""
    if increment.error is not None:
        raise RuntimeError(f"a request failed: {increment.error}")
