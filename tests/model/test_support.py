"""What cannot run on per-head pages is refused, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DiffLlamaConfig,
    DogeConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    RobertaConfig,
    ViTConfig,
)

from tamis.errors import UnsupportedModelError
from tamis.model.interface import NAME, register
from tamis.model.model import Model
from tamis.model.support import check_supported
from tests.tiny_models import GQA, SHAPE, VOCAB


def wrap(config: PreTrainedConfig) -> Model:
    register()
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    return Model(hf, None, "tiny")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3NextConfig(), "recurrent"),
        (Lfm2Config(layer_types=["conv"] * 32), "layers of type conv"),
        (Llama4TextConfig(), "layers of type chunked_attention"),
        (Gemma3nTextConfig(), "use the keys and values of others"),
        (Gemma3TextConfig(**GQA, use_bidirectional_attention=True), "bidirectional"),
        (BloomConfig(), "attention interface"),
        (ViTConfig(), "no causal language model of that type"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_configuration_can_be_enough_to_refuse(config, reason):
    with pytest.raises(UnsupportedModelError, match=f"^tiny is a {config.model_type} .*{reason}"):
        check_supported(config, "tiny")


def test_an_ordinary_decoder_is_not_refused():
    check_supported(LlamaConfig(), "tiny")


ENCODER: dict[str, Any] = SHAPE | {"is_decoder": True}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(**SHAPE), "another rule than causal"),
        (RobertaConfig(**ENCODER | {"pad_token_id": 1}), "does not count positions from 0"),
        (DiffLlamaConfig(**GQA), "attends in layers"),
        (DogeConfig(**GQA), "cannot run with its attention handed over"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_only_shows_when_it_runs_is_refused_by_the_probe(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        wrap(config)


def test_a_chunked_mask_is_refused():
    config = Llama4TextConfig(
        **GQA,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=8,
        layer_types=["chunked_attention"] * 3,
    )
    with pytest.raises(UnsupportedModelError, match="another rule than causal or sliding window"):
        wrap(config)


def test_learned_positions_run_like_rotary_ones():
    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = wrap(config)
    assert model.max_length == 64
    assert [layer.kv_heads for layer in model.layers] == [4, 4]
