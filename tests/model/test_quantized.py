"""Quantized weights: the right products, the memory they save, and answers that stay right."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamis import LLM, SamplingParams, shipped
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.errors import ConfigError
from tamis.model import Model, load_model
from tamis.model.quantized import GROUP, WEIGHTS, quantize_weights, stored_bytes
from tests.model.naive import NaiveAttend
from tests.tiny_models import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAR = {
    "int8": {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 4e-3},
    "int4": {torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 3e-2},
}
"""How far products may lie from the formula's, relative to their norm. Scales in a small dtype are
rounded, so a weight between two steps may go to the other one."""


def layer(out: int, width: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out + width)
    return nn.Linear(width, out, bias=bias, dtype=dtype)


def quantized(module: nn.Linear, weights: str) -> nn.Linear:
    quantize_weights(module, weights)
    return module


def int8_of(weight: Tensor) -> Tensor:
    """What int8 makes of a weight [out, in], by the formula."""
    w = weight.double()
    scale = w.abs().amax(1, keepdim=True) / 127.5
    return (w / scale).round().clamp(-128, 127) * scale


def int4_of(weight: Tensor) -> Tensor:
    """What int4 makes of it: 16 steps from the least to the greatest weight of a group."""
    w = weight.double().view(weight.shape[0], -1, GROUP)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = (high - low) / 15
    return (((w - low) / step).round() * step + low).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weights", "formula"), [("int8", int8_of), ("int4", int4_of)])
def test_products_are_those_of_the_formula(weights, formula, dtype, bias) -> None:
    module = layer(48, 96, dtype, bias)
    exact = module.weight.detach().clone()
    wanted = formula(exact)
    quantized(module, weights)
    for rows in (1, 3, 16, 17, 70):
        x = torch.randn(2, rows, 96).to(dtype)
        y, sure = module(x), F.linear(x.double(), wanted)
        assert y.shape == (2, rows, 48)
        assert y.dtype == dtype
        if bias:
            sure += module.bias.double()
        assert float((y.double() - sure).norm() / sure.norm()) < FAR[weights][dtype]


@torch.no_grad()
def test_weights_lie_within_half_a_step() -> None:
    for weights, formula in (("int8", int8_of), ("int4", int4_of)):
        module = layer(64, 128, bias=False)
        exact = module.weight.detach().clone()
        quantized(module, weights)
        found = module(torch.eye(128)).T.double()
        assert (found - exact).abs().max() <= 1.01 * (formula(exact) - exact).abs().max()
        assert not torch.equal(found.float(), exact)


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 5)])
def test_memory_is_freed(weights: str, bits: int) -> None:
    module = layer(256, 512, torch.bfloat16, bias=False)
    assert stored_bytes(module.weight) == 2 * 256 * 512
    before = weakref.ref(module.weight)
    quantized(module, weights)
    kept = stored_bytes(module.weight)
    scales = 4 * 256 if weights == "int8" else 0  # in int4, a bit of every weight's five
    assert 256 * 512 * bits // 8 <= kept <= 256 * 512 * bits // 8 + 2 * scales
    assert before() is None


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "bf16"), ("llama", "fp32"), ("gemma2", "bf16"), ("phi3", "bf16")]
)
def test_loaded_models_run_near_their_exact_selves(tiny_dir, name, dtype, weights) -> None:
    exact = load_model(tiny_dir(name), dtype=dtype, device="cpu")
    model = load_model(tiny_dir(name), dtype=dtype, device="cpu", weights=weights)
    assert (exact.weights, model.weights) == (None, weights)
    assert model.n_parameters == exact.n_parameters
    assert model.dtype == exact.dtype
    assert model.weight_bytes < exact.weight_bytes
    a, b = logits(exact), logits(model)
    far = float((a - b).norm() / a.norm())
    assert 0 < far < {"int8": 0.1, "int4": 0.7}[weights]


def logits(model: Model) -> Tensor:
    """Of a sequence of 40 tokens, after each of them."""
    attend, at = NaiveAttend(), torch.arange(40)
    attend.owners, attend.positions = [0] * 40, at.tolist()
    return model.forward(at + 20, at, at, attend)


def test_tied_and_untied_projections_stay_exact() -> None:
    for tied in (True, False):
        hf = build("llama")
        if tied:
            hf.config.tie_word_embeddings = True
            hf.tie_weights()
        before = hf.lm_head.weight
        quantize_weights(hf, "int8", exact=hf.lm_head)
        assert hf.lm_head.weight is before
        assert (hf.lm_head.weight is hf.get_input_embeddings().weight) == tied


def test_layers_that_int4_does_not_fit_stay_exact() -> None:
    narrow, odd, good = layer(16, 48), layer(40, 64), layer(32, 64)
    kept = [narrow.weight, odd.weight]
    quantize_weights(nn.ModuleList([narrow, odd, good]), "int4")
    assert [narrow.weight, odd.weight] == kept
    assert stored_bytes(good.weight) < 4 * 32 * 64
    with pytest.raises(
        ConfigError, match="no linear layer of this Linear can be quantized to int4"
    ):
        quantize_weights(layer(40, 64), "int4")


def test_what_cannot_be_had_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown weights 'int5': use one of int8, int4"):
        LLM(tmp_path, weights="int5")


def test_without_torchao_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name)
    )
    with pytest.raises(ConfigError, match=r"torchao; pip install 'tamis\[quantized\]'"):
        load_model(tmp_path, weights="int8")


def test_a_loaded_model_keeps_the_weights_it_has(tiny_dir) -> None:
    model = load_model(tiny_dir("llama"), device="cpu")
    with pytest.raises(ConfigError, match="the model is loaded already"):
        LLM(model, weights="int8", kv_memory="16MiB")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_reference_model_still_finds_facts(weights: str) -> None:
    if shipped.find() is None:
        pytest.skip("needs the reference model in models/; `tamis train reference` makes it")
    llm = LLM("reference", weights=weights, kv_memory="64MiB")
    samples = make_samples(Suite("multi_key", 1024, 10, seed=5), llm.model.tokenizer)
    prompts = [llm.encode(sample.prompt(0)) for sample in samples]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=16, stop=("\n",)))
    right = [
        output.text.strip() == sample.questions[0].answer.strip()
        for output, sample in zip(outputs, samples, strict=True)
    ]
    assert sum(right) >= 9
