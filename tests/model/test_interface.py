"""The attention interface hands over what `Attend` can express and stops everything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from tamis.errors import UnsupportedModelError
from tamis.model.interface import NAME, Mask, PassThroughCache, hand_over, register
from tamis.model.probe import Probe
from tests.tiny_models import GQA


def image_overlay(batch, head, q, k):
    """Tokens 3 .. 5 see each other, as image tokens do."""
    return (q >= 3) & (q <= 5) & (k >= 3) & (k <= 5)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal_mask_function, None),
        Mask(sliding_window_causal_mask_function(5), 5),
        Mask(sliding_window_causal_mask_function(1), 1),
        Mask(sliding_window_causal_mask_function(4096), 4096),
    ],
)
def test_causal_and_sliding_masks_pass(mask):
    mask.check()


@pytest.mark.parametrize(
    "mask",
    [
        Mask(bidirectional_mask_function, None),
        Mask(sliding_window_causal_mask_function(5), None),
        Mask(sliding_window_causal_mask_function(5), 6),
        Mask(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), 8),
        Mask(chunked_causal_mask_function(4096, torch.zeros(1, dtype=torch.long)), 4096),
        Mask(or_masks(causal_mask_function, image_overlay), None),
        Mask(and_masks(causal_mask_function, image_overlay), None),
    ],
)
def test_any_other_mask_is_stopped(mask):
    with pytest.raises(UnsupportedModelError, match="another rule"):
        mask.check()


class Attention(nn.Module):
    layer_idx = 0


def call(**arguments):
    """One probing call of the attention function, 2 query heads and 1 KV head."""
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
    request = {"attention_mask": None, "attend": Probe(), "probe": Probe()} | arguments
    mask = request.pop("attention_mask")
    return hand_over(Attention(), q, k, k, mask, **request)


def test_the_result_is_in_the_layout_that_transformers_expects():
    out, weights = call()
    assert out.shape == (1, 3, 2, 4)
    assert weights is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "builds its own attention mask"),
        ({"is_causal": False}, "bidirectional"),
        ({"position_bias": torch.zeros(1, 2, 3, 3)}, "takes position_bias"),
        ({"block_indices": torch.zeros(3)}, "takes block_indices"),
    ],
)
def test_a_layer_that_asks_for_more_is_stopped(arguments, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        call(**arguments)


def test_flags_and_absent_options_are_no_request():
    call(output_attentions=False, dropout=0.0, position_bias=None)


def test_the_scale_defaults_to_that_of_scaled_dot_product_attention():
    probe = Probe()
    call(attend=probe)
    assert probe.specs[0].scale == 0.5


def test_restarting_positions_are_not_taken_for_packed_sequences():
    register()
    hf = AutoModelForCausalLM.from_config(LlamaConfig(**GQA), attn_implementation=NAME).eval()
    ids, positions = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1, 7]])

    def run(cache: PassThroughCache | None) -> None:
        hf(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=False,
            attend=Probe(),
            probe=Probe(),
        )

    run(PassThroughCache())
    with pytest.raises(UnsupportedModelError, match="another rule"):
        run(None)


def test_the_cache_keeps_nothing():
    cache, k, v = PassThroughCache(), torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    new_k, new_v = cache.update(k, v, 0)
    assert new_k is k
    assert new_v is v
    assert cache.get_seq_length() == 0
    for keep in (cache.update_conv_state, cache.update_recurrent_state, cache.update_indexer):
        with pytest.raises(UnsupportedModelError, match="a state beside keys and values"):
            keep(k, 0)
