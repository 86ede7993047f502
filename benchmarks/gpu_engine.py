"""tamis and 🤗 Transformers on one device, for the end-to-end part of `gpu.py`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from contestants_tamis import Tamis
from contestants_transformers import Transformers
from tamis import LLM, SamplingParams

KV_MEMORY = "1GiB"
"""Room for 32k tokens of the small Llama, in fp32 too."""


class TamisOn(Tamis):
    """tamis with its default settings but for the device, the dtype and what is asked for.

    Args:
        directory: the model.
        cuda_graphs: as for `LLM`.
    """

    def __init__(
        self, directory: Path, device: str, dtype: torch.dtype, cuda_graphs: bool | None = None
    ) -> None:
        self.llm = LLM(
            directory,
            dtype=_name(dtype),
            device=device,
            kv_memory=KV_MEMORY,
            cuda_graphs=cuda_graphs,
        )
        self._stream = None

    def generate(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """The most likely tokens after a prompt."""
        params = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
        return list(self.llm.generate([list(prompt)], params)[0].token_ids)


class TransformersOn(Transformers):
    """Transformers with sdpa attention and a `DynamicCache`, on a device.

    Args:
        directory: the model, whose weights `dtype` holds exactly.
    """

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        super().__init__(directory)
        self.hf.to(device)
        if self.hf.dtype != dtype:
            self.hf.to(dtype)
        self._device = device

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Compute ids [1, tokens] after the cached ones, and the most likely next token."""
        super().forward(ids.to(self._device), positions)

    def generate(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """The most likely tokens after a prompt."""
        self.prefill(prompt)
        tokens = [int(self.next.item())]
        while len(tokens) < n_tokens:
            self.decode(1)
            tokens.append(int(self.next.item()))
        return tokens


def prompt(vocab: int, n_tokens: int) -> list[int]:
    """Random tokens, always the same."""
    return random.Random(0).choices(range(vocab), k=n_tokens)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
