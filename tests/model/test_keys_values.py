"""A layer's keys and values can be had without its attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tamis.errors import UnsupportedModelError
from tamis.model import RowRanges, load_model

N = 12


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "cohere", "gpt-neox"])
def test_they_are_those_of_a_whole_forward(tiny_dir: Callable[[str], Path], name: str) -> None:
    model = load_model(tiny_dir(name), dtype="float32", device="cpu")
    ids, at = torch.arange(N) + 40, torch.arange(N) * 3
    seen = {}

    def attend(layer, q, k, v, **how):
        seen[layer] = (k.clone(), v.clone())
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).contiguous()

    model.forward(ids, at, ids[:0], attend)
    for layer in (1, 2):
        edge = torch.full((N,), layer - 1)
        rows = RowRanges(torch.zeros_like(edge), edge)
        _, hidden = model.forward(ids, at, ids[:0], attend, rows=rows)
        some = torch.tensor([1, 5, 6, 11])
        k, v = model.keys_values(layer, hidden[some], at[some])
        torch.testing.assert_close(k, seen[layer][0][some], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, seen[layer][1][some], atol=1e-5, rtol=1e-5)
    logits = model.forward(ids, at, ids[:0] + 0, attend)
    assert logits.shape[0] == 0  # the model runs on as before


def test_keys_that_depend_on_the_length_are_refused(tiny_dir: Callable[[str], Path]) -> None:
    model = load_model(tiny_dir("llama-dynamic"), dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModelError, match="depend on the sequence's length"):
        model.keys_values(1, torch.zeros(2, 64), torch.arange(2))
