"""What a Llama's weights are called in a GGUF file, and how their rows are ordered there."""

from __future__ import annotations

import re

import numpy as np

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """A weight's name in llama.cpp: "model.layers.3.mlp.up_proj.weight" is "blk.3.ffn_up.weight".

    Raises:
        KeyError: a Llama has no such weight.
    """
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if found:
        return f"blk.{found[1]}.{_NAMES[found[2]]}.weight"
    return _NAMES[name.removesuffix(".weight")] + ".weight"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * dim, ...] in llama.cpp's order: it rotates
    neighbouring channels, where 🤗 Transformers rotates a head's halves."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
