"""🤗 Transformers on the same model and prompts: what `tamis demo` compares with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


@dataclass(frozen=True)
class Generation:
    """What one `generate` gave and took: seconds, and bytes of its KV cache at the end."""

    token_ids: list[int]
    ttft_s: float
    tpot_s: float
    kv_bytes: int


class TransformersPeer:
    """Transformers' own greedy `generate` (sdpa attention, its default cache), one prompt at a
    time, with the end-of-sequence token treated as any other.

    Args:
        directory: the model.
        dtype, device: of its weights.
    """

    def __init__(
        self, directory: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._hf = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa"
        ).to(device)
        self._hf.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(self, prompt: Sequence[int], n_tokens: int) -> Generation:
        """Generate exactly `n_tokens` (at least 2) tokens after `prompt`."""
        clock = _Clock()
        ids = torch.tensor([list(prompt)], device=self._hf.device)
        out = self._hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            streamer=clock,
            return_dict_in_generate=True,
        )
        start, first, *_, last = clock.times
        return Generation(
            token_ids=out.sequences[0, len(prompt) :].tolist(),
            ttft_s=first - start,
            tpot_s=(last - first) / (n_tokens - 1),
            kv_bytes=sum(
                layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers
            ),
        )


class _Clock:
    """A streamer that notes when the prompt is handed over and when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
