"""A Llama in 🤗 format written as a GGUF file, in bf16, for llama.cpp.

    build/peers/llama.cpp/bin/python benchmarks/peers_gguf.py DIRECTORY

Writes DIRECTORY/model.gguf, without a tokenizer. llama.cpp's own converter wants one, and torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from gguf import GGMLQuantizationType, GGUFWriter

from contestants_llamacpp import GGUF
from peers_weights import gguf_name, interleaved


def convert(directory: Path) -> Path:
    """Write the file; it appears when it is complete. Returns its path."""
    config = json.loads((directory / "config.json").read_text())
    unfinished = directory / (GGUF + ".part")
    writer = GGUFWriter(unfinished, "llama")
    _describe(writer, config)
    weights = safetensors.deserialize((directory / "model.safetensors").read_bytes())
    for name, tensor in sorted(weights, key=lambda weight: weight[0]):
        _add(writer, name, tensor, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.rename(directory / GGUF)


def _describe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _add(writer: GGUFWriter, name: str, tensor: dict[str, Any], config: dict[str, Any]) -> None:
    """Add one bf16 weight; norms are widened to fp32, which llama.cpp wants."""
    bits = np.frombuffer(tensor["data"], np.uint16).reshape(tensor["shape"])
    if "q_proj" in name:
        bits = interleaved(bits, config["num_attention_heads"])
    elif "k_proj" in name:
        bits = interleaved(bits, config["num_key_value_heads"])
    if bits.ndim == 1:
        widened = (bits.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(gguf_name(name), widened)
    else:
        raw = np.ascontiguousarray(bits).view(np.uint8)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)


if __name__ == "__main__":
    print(convert(Path(sys.argv[1])))
