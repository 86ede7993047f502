"""The model that is measured: a Llama of random weights, and what its shape costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama; by default 26.7 M parameters, 22.5 M of them in the layers.

    Attributes:
        max_tokens: the longest sequence, prompt and output.
        dtype: of the saved weights, and of keys and values.
    """

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 8
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 4096
    max_tokens: int = 40_960
    dtype: torch.dtype = torch.bfloat16

    def save(self, directory: Path) -> None:
        """Write the model in 🤗 format, from a fixed seed; torch's own seed is left alone."""
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.q_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_tokens,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(self.dtype).save_pretrained(directory)

    @property
    def layer_elements(self) -> int:
        """Elements of all layers' matrices: each is multiplied with every token once."""
        attention = 2 * (self.q_heads + self.kv_heads) * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """Parameters; input and output embeddings are two matrices."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layer_elements + norms + 2 * self.vocab * self.hidden

    def kv_bytes(self, n_tokens: int) -> int:
        """Bytes of the keys and values of so many tokens, without positions and padding."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize * n_tokens

    def decode_bytes(self, context: int, batch: int = 1) -> int:
        """Bytes that one decode step must read: every weight once (of the input embedding only a
        row per sequence), and the keys and values of each sequence's `context` tokens."""
        weights = self.parameters - (self.vocab - batch) * self.hidden
        return weights * self.dtype.itemsize + batch * self.kv_bytes(context)

    def prefill_flops(self, n_tokens: int) -> int:
        """Floating point operations that a prompt must take: the layers' matrices for every token,
        the scores and the weighted values of every visible pair, and one row of logits."""
        pairs = n_tokens * (n_tokens + 1) // 2
        attention = 4 * self.layers * self.q_heads * self.head_dim * pairs
        return 2 * self.layer_elements * n_tokens + attention + 2 * self.vocab * self.hidden
