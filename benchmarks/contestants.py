"""The two that are compared, with the same few things to do: tamis and 🤗 Transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tamis import LLM, SamplingParams
from tamis.cli.peer import TransformersPeer
from tamis.engine.outputs import Increment

KV_MEMORY = "1GiB"
"""Room for the longest prompt and for all concurrent ones; only pages in use are ever committed."""


class Contestant(Protocol):
    """An engine that holds one sequence at a time. Seconds are wall clock."""

    def prefill(self, prompt: Sequence[int]) -> float:
        """Forget the sequence before, compute a prompt and its first token; the seconds taken."""

    def decode(self, n_tokens: int) -> float:
        """Generate `n_tokens` more tokens of it; the seconds per token."""

    @property
    def kv_bytes(self) -> int:
        """Bytes that the sequence's keys and values take now."""


@dataclass(frozen=True)
class Throughput:
    """How fast several requests were answered, tokens per second over all of them.

    Attributes:
        tokens_per_s: tokens generated, over the whole time, prompts included.
        decode_tokens_per_s: the same while no prompt was being computed and none had ended.
        overhead: the share of that decoding that was spent outside the model's forward, where the
            engine tells.
    """

    tokens_per_s: float
    decode_tokens_per_s: float
    overhead: float | None = None


class Crowd(Protocol):
    """An engine, or a way of using one, that answers several requests."""

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """Generate `n_tokens` tokens after each of the prompts."""


class Tamis:
    """tamis, through its public API, in bf16, with its default settings.

    Args:
        directory: the model.
    """

    def __init__(self, directory: Path) -> None:
        self.llm = LLM(directory, dtype="bfloat16", device="cpu", kv_memory=KV_MEMORY)
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

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """Run prompts at once to `n_tokens` tokens each.

        Raises:
            RuntimeError: a request failed, or never did all of them decode in one step.
        """
        self._stream = None
        engine, stats = self.llm.engine, self.llm.engine.stats
        params = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
        for prompt in prompts:
            engine.add_request(prompt, params)
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


class Transformers:
    """🤗 Transformers in bf16 with sdpa attention: the prompt in one forward that computes the last
    token's logits only, then a greedy loop over its `DynamicCache`, without `generate`'s checks.

    Args:
        directory: the model.
    """

    def __init__(self, directory: Path) -> None:
        self._hf = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._cache: DynamicCache | None = None
        self._next = torch.empty(1, 0, dtype=torch.long)

    def prefill(self, prompt: Sequence[int]) -> float:
        """As `Contestant.prefill`."""
        self._cache = None  # frees the sequence before
        self._cache = DynamicCache(config=self._hf.config)
        start = time.perf_counter()
        self._forward(torch.tensor([list(prompt)]))
        return time.perf_counter() - start

    def decode(self, n_tokens: int) -> float:
        """As `Contestant.decode`."""
        start = time.perf_counter()
        for _ in range(n_tokens):
            self._forward(self._next)
        return (time.perf_counter() - start) / n_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        assert self._cache is not None
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> None:
        logits = self._hf(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._next = logits[:, -1].argmax(-1, keepdim=True)
        self._next.item()  # a user reads each token


class OneByOne:
    """🤗 Transformers' own greedy `generate` in bf16, one request after the other.

    Args:
        directory: the model.
    """

    def __init__(self, directory: Path) -> None:
        self._peer = TransformersPeer(directory, torch.bfloat16)

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """Generate `n_tokens` tokens, at least 2, after each of the prompts."""
        start = time.perf_counter()
        generations = [self._peer.generate(prompt, n_tokens) for prompt in prompts]
        took = time.perf_counter() - start
        return Throughput(
            tokens_per_s=len(prompts) * n_tokens / took,
            decode_tokens_per_s=len(prompts) / sum(g.tpot_s for g in generations),
        )


def _check(increment: Increment) -> None:
    """Raise RuntimeError if the request failed."""
    if increment.error is not None:
        raise RuntimeError(f"a request failed: {increment.error}")
