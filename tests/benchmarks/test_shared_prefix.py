"""The benchmark of shared prefixes measures what it says, in miniature."""

from __future__ import annotations

import pytest
import torch

import shared_prefix
from tamis.attention import decode
from tamis.model import load_model


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, dtype="float32", device="cpu")


def test_reuse_answers_the_same_prompts_as_none(model):
    workload = shared_prefix.Workload(model, shared=128, own=4, requests=3, new=2)
    for reuse in (False, True):
        sample = workload.run(reuse=reuse)
        assert set(sample) == {"tokens_s", "first_s", "again_s"}
        assert min(sample.values()) > 0


def test_together_and_apart_are_the_same_attention(model):
    layer = shared_prefix.OneLayer(model, shared=128, sequences=3)
    pages = layer.view.pages(0, 0, 3, with_new=True)
    apart, _ = decode(layer.q, pages, scale=layer.options.scale)
    together, _ = layer.together(0, layer.q, layer.options)
    torch.testing.assert_close(together, apart)
    assert layer.seconds(together=True, repeats=1) > 0


def test_tables_have_a_line_per_kind(model):
    samples = {"a": [{"tokens_s": 2.0, "first_s": 1.0, "again_s": 0.1}]}
    samples["b"] = [{"tokens_s": 8.0, "first_s": 1.0, "again_s": 0.25}]
    assert shared_prefix.reuse_lines(samples)[-1] == "| b | 8 | 4.0 | 1.000 | 0.250 | 0.250 |"
    assert len(shared_prefix.attention_lines(model, (64,), (2, 3), rounds=1)) == 4
