"""Small random-weight models of many architectures, and a tokenizer for them.

They are made in milliseconds, and their logits differ by whole units, so that the greedy token is
decided by the weights and not by rounding. Windows are 16 tokens and the trained lengths of scaled
RoPE 32, so that prompts of some tens of tokens go beyond both.

    from tests.tiny_models import CONFIGS, build, save
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    T5Config,
)
from transformers.utils import logging as hf_logging

WINDOW = 16
"""The sliding window of the models that have one."""

VOCAB = 264
"""Ids 0..255 are bytes; then BOS, EOS, PAD; the rest has no text."""

BOS, EOS, PAD = 256, 257, 258

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
GQA: dict[str, Any] = SHAPE | {"num_key_value_heads": 2}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _llama(max_length: int = 512, **rope: Any) -> LlamaConfig:
    shape = GQA | {"max_position_embeddings": max_length}
    return LlamaConfig(**shape, rope_parameters={"rope_theta": 10_000.0} | rope)


def _longrope() -> Phi3Config:
    half = 64 // 4 // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + 0.5 * i for i in range(half)],
        "original_max_position_embeddings": 32,
    }
    return Phi3Config(
        **GQA | {"max_position_embeddings": 256},
        rope_parameters=rope,
        original_max_position_embeddings=32,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: _llama(rope_type="default"),
    "llama-llama3": lambda: _llama(
        256,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "llama-linear": lambda: _llama(128, rope_type="linear", factor=4.0),
    "llama-yarn": lambda: _llama(
        256, rope_type="yarn", factor=8.0, original_max_position_embeddings=32
    ),
    "llama-dynamic": lambda: _llama(32, rope_type="dynamic", factor=8.0),
    "mistral": lambda: MistralConfig(**GQA, sliding_window=WINDOW),
    "mixtral": lambda: MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: Qwen2Config(**GQA),
    "qwen3": lambda: Qwen3Config(**GQA, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **GQA,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **GQA,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**GQA),
    "phi3-longrope": _longrope,
    "olmo2": lambda: Olmo2Config(**GQA),
    "granite": lambda: GraniteConfig(
        **GQA,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        logits_scaling=1.5,
    ),
    "cohere": lambda: CohereConfig(**GQA, logit_scale=0.5, use_qk_norm=True),
    "stablelm": lambda: StableLmConfig(**GQA, partial_rotary_factor=0.25, use_qkv_bias=True),
    "gpt-neox": lambda: GPTNeoXConfig(**SHAPE, rotary_pct=0.25),
    "gpt-oss": lambda: GptOssConfig(
        **GQA,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
}
"""The architectures that must run exactly."""

REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5": lambda: T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=2),
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1),
    "deepseek-v3": lambda: DeepseekV3Config(
        **GQA,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=3,
    ),
}
"""Architectures that cannot run on per-head KV pages."""


def build(name: str, seed: int = 0, attn: str = "eager") -> PreTrainedModel:
    """The model called `name` in CONFIGS or REFUSED: fp32, on the CPU, in eval mode.

    `attn` is the attention implementation of Transformers: eager honours soft-caps and sinks.
    """
    config = (CONFIGS | REFUSED)[name]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Cached by callers: whoever asks first, the weights must serve everyone.
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attn)
        # Sinks, biases and the weights of norms start as constants; make them matter too.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so any text has ids; encoding text puts BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | specials
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def save(name: str, directory: Path, seed: int = 0, with_tokenizer: bool = True) -> Path:
    """Write `build(name, seed)` and the tokenizer to `directory`; returns it."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        build(name, seed).save_pretrained(directory)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return directory
