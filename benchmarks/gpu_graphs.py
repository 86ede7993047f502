"""Decode steps recorded in CUDA graphs beside the same steps launched one kernel at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_checks import Check
from gpu_engine import TamisOn, prompt
from random_llama import LlamaShape
from tamis import SamplingParams
from timing import Spread, in_turns

WAYS = {"recorded": True, "launched": False}
"""How a step runs, and the setting of `LLM` that has it run so."""


@dataclass(frozen=True)
class StepTimes:
    """Decode steps of so many requests at once.

    Attributes:
        context: tokens of each prompt.
        step_ms: of one step, sampling included, "recorded" first.
        limit_ms: the bytes of weights and KV over the bandwidth.
    """

    rows: int
    context: int
    dtype: str
    step_ms: dict[str, Spread]
    limit_ms: float


def both(directory: Path, device: str, dtype: torch.dtype) -> dict[str, TamisOn]:
    """tamis with and without recorded steps. On a CPU "recorded" steps run over fixed memory, as
    those that a graph would record."""
    return {
        name: TamisOn(directory, device, dtype, cuda_graphs=wanted) for name, wanted in WAYS.items()
    }


def same_tokens(
    directory: Path, device: str, shape: LlamaShape, contexts: Sequence[int], decoded: int
) -> Check:
    """Whether requests of these contexts together get the same greedy tokens in fp32, and whether
    their steps were recorded at all."""
    engines = both(directory, device, torch.float32)
    prompts = [prompt(shape.vocab, n) for n in contexts]
    lengths = [SamplingParams(max_tokens=decoded - i, ignore_eos=True) for i in range(len(prompts))]
    ours, theirs = (
        [output.token_ids for output in engine.llm.generate(prompts, lengths)]
        for engine in engines.values()
    )
    graphs = engines["recorded"].llm.engine.graphs
    run = 0 if graphs is None else graphs.run
    differ = sum(
        a != b
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    message = "" if run else "no step was recorded; the log says why"
    if differ:
        message = f"{ours} is not {theirs}"
    return Check(
        "greedy tokens of recorded steps",
        "float32",
        shape.head_dim,
        shape.q_heads // shape.kv_heads,
        differ,
        0,
        not message,
        message,
    )


def time_steps(
    engines: dict[str, TamisOn],
    shape: LlamaShape,
    rows: int,
    context: int,
    decoded: int,
    rounds: int,
    bytes_per_s: float,
) -> StepTimes:
    """Milliseconds of the steps in which `rows` requests decode at once, of `engines` as `both`
    makes them; the first round, which records and compiles, is not counted."""
    prompts = [prompt(shape.vocab, context)] * rows

    def step_ms(engine: TamisOn) -> float:
        return 1e3 * rows / engine.answer(prompts, decoded).decode_tokens_per_s

    turns = {name: lambda engine=engine: step_ms(engine) for name, engine in engines.items()}
    in_turns(turns, 1)
    samples = in_turns(turns, rounds)
    return StepTimes(
        rows,
        context,
        str(shape.dtype).removeprefix("torch."),
        {name: Spread.of(ms) for name, ms in samples.items()},
        1e3 * shape.decode_bytes(context + decoded // 2, rows) / bytes_per_s,
    )
