"""What `tamis demo` runs, in tamis and in 🤗 Transformers, and what it costs in each."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tamis.cli.peer import TransformersPeer
from tamis.engine.outputs import RequestOutput
from tamis.errors import RequestError
from tamis.llm import LLM
from tamis.platform import available_memory
from tamis.sampling import SamplingParams

LONG = 8192
CONCURRENT = 8
NEW_TOKENS = 32
CHECKED_PROMPT, CHECKED_TOKENS = 64, 32
_WARM_UP = 16
_QUESTIONS = 512  # tokens that a conversation about the text may take beyond it


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids: a long one, then some shorter ones at once."""

    long: list[int]
    concurrent: list[list[int]]


@dataclass(frozen=True)
class Cost:
    """What a workload cost.

    Attributes:
        prefill_s: from handing in the long prompt to its first token, seconds.
        decode_s: per token after the long prompt, seconds.
        tokens_per_s: tokens generated for the shorter prompts, over the time that all of them
            took together, their prefill included.
        kv_bytes: the most the long prompt's keys and values took.
    """

    prefill_s: float
    decode_s: float
    tokens_per_s: float
    kv_bytes: int


def prepare(llm: LLM, text: str, n_tokens: int | None) -> Workload:
    """Cut a long prompt of `n_tokens` tokens and `CONCURRENT` of an eighth of it from `text`.

    None is `LONG` tokens, or as many as the text has or the model's context holds with questions.

    Raises:
        RequestError: the text or the model's context is too short for that, or `n_tokens` is.
    """
    ids = llm.encode(text)
    least = CHECKED_PROMPT * CONCURRENT
    if n_tokens is None:
        n_tokens = max(least, min(LONG, len(ids), llm.model.max_length - _QUESTIONS))
    if n_tokens < least:
        raise RequestError(f"--tokens is {n_tokens}; the least is {least}")
    if n_tokens > len(ids):
        shorter = f", or --tokens {len(ids)}" if len(ids) >= least else ""
        raise RequestError(
            f"the text has {len(ids):,} tokens, fewer than {n_tokens:,}; give a longer one{shorter}"
        )
    room = llm.model.max_length - NEW_TOKENS
    if n_tokens > room:
        raise RequestError(
            f"the model's context has room for {room:,} prompt tokens, not {n_tokens:,}; "
            f"give --tokens {room}"
        )
    size = n_tokens // CONCURRENT
    long = ids[:n_tokens]
    return Workload(long, [long[i * size : (i + 1) * size] for i in range(CONCURRENT)])


def measure_tamis(llm: LLM, work: Workload) -> tuple[Cost, str]:
    """Run `work` here: its cost, and the text that goes on after the long prompt."""
    params = _exactly(NEW_TOKENS)
    llm.generate([work.long[:_WARM_UP]], _exactly(2), progress=False)
    (long,) = llm.generate([work.long], params)
    _check(long)
    start = time.perf_counter()
    for output in llm.generate(work.concurrent, params):
        _check(output)
    took = time.perf_counter() - start
    metrics = long.metrics
    assert metrics.ttft_s is not None
    assert metrics.tpot_s is not None
    cost = Cost(
        prefill_s=metrics.ttft_s,
        decode_s=metrics.tpot_s,
        tokens_per_s=NEW_TOKENS * len(work.concurrent) / took,
        kv_bytes=metrics.kv_bytes_peak,
    )
    return cost, long.text


def measure_transformers(peer: TransformersPeer, work: Workload) -> Cost:
    """Run `work` in Transformers, where the shorter prompts go one by one."""
    peer.generate(work.long[:_WARM_UP], 2)
    long = peer.generate(work.long, NEW_TOKENS)
    start = time.perf_counter()
    for prompt in work.concurrent:
        peer.generate(prompt, NEW_TOKENS)
    took = time.perf_counter() - start
    return Cost(
        prefill_s=long.ttft_s,
        decode_s=long.tpot_s,
        tokens_per_s=NEW_TOKENS * len(work.concurrent) / took,
        kv_bytes=long.kv_bytes,
    )


def equal_tokens(
    model: str, prompt: list[int], kv_memory: str, device: torch.device, n_parameters: int
) -> int | None:
    """How many of `CHECKED_TOKENS` greedy tokens are those of Transformers, both in fp32.

    Returns:
        The count, or None where memory does not hold the weights in fp32.
    """
    if available_memory(device) < n_parameters * torch.float32.itemsize:
        return None
    prompt = prompt[:CHECKED_PROMPT]
    llm = LLM(model, dtype="float32", device=str(device), kv_memory=kv_memory)
    (output,) = llm.generate([prompt], _exactly(CHECKED_TOKENS), progress=False)
    _check(output)
    del llm
    expected = TransformersPeer(model, torch.float32, device).generate(prompt, CHECKED_TOKENS)
    return sum(a == b for a, b in zip(output.token_ids, expected.token_ids, strict=True))


def _exactly(n_tokens: int) -> SamplingParams:
    """Greedy, and neither more nor fewer tokens than that."""
    return SamplingParams(max_tokens=n_tokens, ignore_eos=True)


def _check(output: RequestOutput) -> None:
    """Raise RequestError if a request failed while it ran."""
    if output.finish_reason == "error":
        raise RequestError(f"a request failed: {output.completions[0].error}")
