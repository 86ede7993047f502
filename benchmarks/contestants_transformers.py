"""🤗 Transformers in bf16 with sdpa attention, one request at a time or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from contestants import Throughput


class Transformers:
    """The prompt in one forward that computes the last token's logits only, then a greedy loop over
    its `DynamicCache`, without `generate`'s checks.

    Args:
        directory: the model.
    """

    def __init__(self, directory: Path) -> None:
        self.hf = load(directory)
        self.cache: DynamicCache | None = None
        self.next = torch.empty(1, 0, dtype=torch.long)

    def prefill(self, prompt: Sequence[int]) -> float:
        """As `Contestant.prefill`."""
        self.cache = None  # frees the sequence before
        self.cache = DynamicCache(config=self.hf.config)
        start = time.perf_counter()
        self.forward(torch.tensor([list(prompt)]))
        return time.perf_counter() - start

    def decode(self, n_tokens: int) -> float:
        """As `Contestant.decode`."""
        start = time.perf_counter()
        for _ in range(n_tokens):
            self.forward(self.next)
        return (time.perf_counter() - start) / n_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors."""
        assert self.cache is not None
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Compute ids [1, tokens] after the cached ones, and the most likely next token."""
        logits = self.hf(
            ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.next = logits[:, -1].argmax(-1, keepdim=True)
        self.next.item()  # a user reads each token


class ContinuousBatching:
    """`generate_batch`: all requests in one batch over paged KV.

    Args:
        directory: the model.
        page_memory: bytes of its KV pages; the default of Transformers is nearly all the memory.
    """

    def __init__(self, directory: Path, page_memory: int = 1 << 30) -> None:
        self._hf = load(directory)
        self._page_memory = page_memory

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """As `Crowd.answer`.

        Raises:
            RuntimeError: a request failed.
        """
        from transformers import ContinuousBatchingConfig

        page_size, config = 256, self._hf.config
        token_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        start = time.perf_counter()
        outputs = self._hf.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=n_tokens, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=self._page_memory // (page_size * token_bytes),
                max_batch_tokens=2048,
            ),
            record_timestamps=True,
        )
        took = time.perf_counter() - start
        answers = list(outputs.values())
        if len(answers) < len(prompts) or any(
            len(one.generated_tokens) != n_tokens for one in answers
        ):
            raise RuntimeError("a request of generate_batch was not answered")
        return Throughput(
            tokens_per_s=len(prompts) * n_tokens / took,
            decode_tokens_per_s=_together([one.timestamps for one in answers]),
        )


def load(directory: Path) -> torch.nn.Module:
    """The model in bf16."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()


def _together(timestamps: Sequence[Sequence[float]]) -> float:
    """Tokens per second from the time when the last request had its first token to the time when
    the first one had its last; nan if there was no such time."""
    begin = max(times[0] for times in timestamps)
    end = min(times[-1] for times in timestamps)
    between = sum(begin < time <= end for times in timestamps for time in times)
    return between / (end - begin) if end > begin else float("nan")
