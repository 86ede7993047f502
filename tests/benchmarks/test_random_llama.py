"""What the shape says that a step costs is what Transformers' model of that shape does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from random_llama import LlamaShape


@pytest.fixture(scope="module")
def hf(directory):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


def test_the_default_has_27_million_parameters_to_the_nearest_million():
    assert round(LlamaShape().parameters / 1e6) == 27


def test_parameters_are_those_of_the_model(shape, hf):
    assert shape.parameters == sum(p.numel() for p in hf.parameters())


def test_weights_are_saved_in_the_shapes_dtype(shape, hf):
    assert {p.dtype for p in hf.parameters()} == {shape.dtype}


def test_saving_leaves_the_random_state_alone(shape, tmp_path):
    before = torch.get_rng_state()
    shape.save(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_prefill_flops_are_those_of_token_by_token_but_for_the_logits_in_between(shape, hf):
    n_tokens, cache = 9, DynamicCache(config=hf.config)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for token in range(n_tokens):
            hf(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    logits = 2 * shape.vocab * shape.hidden
    counted = counter.get_total_flops() - (n_tokens - 1) * logits
    assert shape.prefill_flops(n_tokens) == counted


@pytest.mark.parametrize("batch", [1, 8])
def test_decode_reads_all_weights_once_and_every_sequences_cache(shape, hf, batch):
    cache = DynamicCache(config=hf.config)
    with torch.inference_mode():
        hf(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weights = sum(p.nbytes for p in hf.parameters())
    embedding = hf.get_input_embeddings().weight
    rows = embedding[:batch].nbytes
    assert shape.decode_bytes(5, batch) == weights - embedding.nbytes + rows + batch * kv_bytes
