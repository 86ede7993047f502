"""Keys that are shifted are the keys that the model makes at the other position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    GlmConfig,
    GPT2Config,
    PreTrainedConfig,
    SmolLM3Config,
)

from tamis.errors import UnsupportedModelError
from tamis.model import Model, load_model
from tamis.model.interface import NAME, register
from tests.model.naive import NaiveAttend
from tests.tiny_models import CONFIGS, GQA, VOCAB, WINDOW

N = 24
FIXED = [name for name in CONFIGS if name not in ("llama-dynamic", "phi3-longrope")]
OTHERS = {
    # interleaved and partial
    "glm": lambda: GlmConfig(**GQA, head_dim=16, partial_rotary_factor=0.5),
    # every layer but the second rotates / layers without a window do not rotate
    "smollm3": lambda: SmolLM3Config(**GQA, no_rope_layers=[1, 0, 1]),
    "cohere2": lambda: Cohere2Config(
        **GQA,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def wrap(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Model:
    register()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    return Model(hf.to(dtype), None, "tiny")


class KeepKeys(NaiveAttend):
    """Attention in which every token sees itself alone, so that hidden states know no position."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        self.keys.append(k.clone())
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def keys(model: Model, positions: Tensor) -> list[Tensor]:
    """Keys [kv_heads, tokens, k_dim] of each layer for the same tokens at `positions`."""
    attend = KeepKeys()
    ids = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(1))
    model.forward(ids, positions, positions[:0], attend)
    return [k.transpose(0, 1) for k in attend.keys]


def moves() -> tuple[Tensor, Tensor]:
    """Positions before and after, both ways, some the same."""
    generator = torch.Generator().manual_seed(9)
    before, after = (torch.randint(0, 120, (N,), generator=generator) for _ in range(2))
    after[:2] = before[:2]
    return before, after


def assert_shifts(model: Model, atol: float) -> None:
    before, after = moves()
    assert model.can_shift
    pairs = zip(keys(model, before), keys(model, after), strict=True)
    for layer, (k, expected) in enumerate(pairs):
        got = model.shift_keys(layer, k, after - before)
        assert got.dtype == k.dtype
        torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", FIXED)
def test_shifted_keys_are_those_of_the_other_position(name, tiny_dir):
    assert_shifts(load_model(tiny_dir(name), dtype="fp32", device="cpu"), atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_and_layers_without_rope_too(name):
    assert_shifts(wrap(OTHERS[name]()), atol=1e-4)


def test_bf16_keys_shift_to_their_precision():
    model = wrap(OTHERS["glm"](), torch.bfloat16)
    before, after = moves()
    for layer, (k, expected) in enumerate(
        zip(keys(model, before), keys(model, after), strict=True)
    ):
        got = model.shift_keys(layer, k, after - before)
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_layers_that_do_not_rotate_give_their_keys_back():
    model = wrap(OTHERS["smollm3"]())
    k = keys(model, torch.arange(N))
    delta = torch.full((N,), 7)
    assert model.shift_keys(1, k[1], delta) is k[1]
    assert not torch.allclose(model.shift_keys(0, k[0], delta), k[0], atol=1e-2)


def test_there_and_back_is_where_it_was(tiny_dir):
    model = load_model(tiny_dir("llama-yarn"), dtype="fp32", device="cpu")
    k = torch.randn(2, 3, N, 16, generator=torch.Generator().manual_seed(0))
    delta = torch.arange(N) * 5 - 40
    there = model.shift_keys(0, k, delta)
    torch.testing.assert_close(model.shift_keys(0, there, -delta), k, atol=1e-5, rtol=0)
    torch.testing.assert_close(there.norm(dim=-1), k.norm(dim=-1))


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(name, tiny_dir):
    model = load_model(tiny_dir(name), dtype="fp32", device="cpu")
    assert not model.can_shift
    with pytest.raises(UnsupportedModelError, match=r"cannot move cached keys.*depends on the seq"):
        model.shift_keys(0, torch.zeros(1, 2, 16), torch.ones(2, dtype=torch.long))


def test_learned_positions_are_refused():
    model = wrap(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    assert not model.can_shift
    with pytest.raises(UnsupportedModelError, match=r"in layer 0, .* not a rotation"):
        model.shift_keys(0, torch.zeros(1, 2, 16), torch.ones(2, dtype=torch.long))


def test_disagreeing_shapes_are_an_error(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    with pytest.raises(ValueError, match=r"delta \[tokens\].*\[1, 2, 16\], \[3\]"):
        model.shift_keys(0, torch.zeros(1, 2, 16), torch.ones(3, dtype=torch.long))
