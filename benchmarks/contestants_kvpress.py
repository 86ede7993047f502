"""kvpress: 🤗 Transformers whose cache is compressed at the end of the prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import kvpress
import torch
from transformers import DynamicCache

from contestants_transformers import Transformers


class KVPress(Transformers):
    """The prompt in one forward under a press, then the loop of `Transformers`, at the positions
    that the tokens would have had without compression, as kvpress's own pipeline does.

    Args:
        directory: the model.
        press: the name of one of kvpress's classes.
        ratio: the share of the prompt's tokens that it drops.
    """

    def __init__(self, directory: Path, press: str, ratio: float) -> None:
        super().__init__(directory)
        self._press = getattr(kvpress, press)(compression_ratio=ratio)
        self._position = 0

    def prefill(self, prompt: Sequence[int]) -> float:
        """As `Contestant.prefill`."""
        self.cache = None  # frees the sequence before
        self.cache = DynamicCache(config=self.hf.config)
        start = time.perf_counter()
        with self._press(self.hf):
            self.forward(torch.tensor([list(prompt)]))
        self._position = len(prompt)
        return time.perf_counter() - start

    def decode(self, n_tokens: int) -> float:
        """As `Contestant.decode`."""
        start = time.perf_counter()
        for _ in range(n_tokens):
            self.forward(self.next, torch.tensor([[self._position]]))
            self._position += 1
        return (time.perf_counter() - start) / n_tokens
