"""Root mean square norms: the kernels' results are torch's, but for how they add."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tamis.model import load_model
from tamis.model import norm as norms
from tamis.model.norm import RmsStyle, find_norm, quick_norms, rms_norm
from tests.instruction_sets import isas

HALVES = (torch.bfloat16, torch.float16)
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KINDS = {
    RmsStyle.ROUNDED: LlamaRMSNorm,
    RmsStyle.WEIGHTED: GptOssRMSNorm,
    RmsStyle.PLUS_ONE: Gemma2RMSNorm,
}


def made(style: RmsStyle, width: int, dtype: torch.dtype) -> nn.Module:
    """Transformers' norm of that style with random weights."""
    module = KINDS[style](width, eps=1e-5)
    generator = torch.Generator().manual_seed(width)
    nn.init.normal_(module.weight, std=0.7, generator=generator)
    return module.to(dtype)


def rows(n: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + width)
    return (3 * torch.randn(n, width, generator=generator)).to(dtype)


def assert_near(y: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor) -> None:
    """At most two roundings fall to the other side, and nearly everywhere none."""
    wanted, y = wanted.double(), y.double()
    assert ((y - wanted).abs() <= 4 * EPS[x.dtype] * wanted.abs() + 2.0**-22).all()
    assert (y != wanted).double().mean() < 0.02


@pytest.mark.parametrize("style", RmsStyle)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_norm_is_known_by_what_it_computes(style, dtype):
    norm = find_norm(made(style, 96, dtype))
    assert norm is not None
    assert (norm.epsilon, norm.style) == (1e-5, style)


class Centred(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


def test_what_computes_something_else_is_no_norm():
    assert find_norm(Centred(96).bfloat16()) is None
    assert find_norm(nn.LayerNorm(96).bfloat16()) is None
    assert find_norm(nn.Linear(96, 96).bfloat16()) is None


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("style", RmsStyle)
@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_torchs_up_to_rounding(extension, isa, style, dtype):
    for width in (1, 3, 17, 64, 100, 896):
        module = made(style, width, dtype)
        norm = find_norm(module)
        assert norm is not None
        x = rows(5, width, dtype)
        with torch.no_grad():
            assert_near(rms_norm(extension, norm, x, module.weight, isa=isa), module(x), x)


@torch.no_grad()
def test_gradients_and_other_dtypes_meet_torch(extension, monkeypatch):
    module = made(RmsStyle.ROUNDED, 64, torch.bfloat16)
    plain = deepcopy(module)
    quick_norms(module)
    calls = []

    def counted(extension, norm, x, weight):
        calls.append(len(x))
        return rms_norm(extension, norm, x, weight)

    monkeypatch.setattr(norms, "rms_norm", counted)
    for n in (1, 700):
        x = rows(n, 64, torch.bfloat16)
        assert_near(module(x), plain(x), x)
    assert module(x[:0]).shape == (0, 64)
    with torch.enable_grad():
        module(x.requires_grad_()[:2]).sum().backward()
    assert x.grad[:2].all()
    assert module.float()(x[:2].detach().float()).dtype == torch.float32
    assert calls == [1, 700]


def test_a_row_does_not_see_threads(extension):
    module = made(RmsStyle.ROUNDED, 96, torch.bfloat16)
    norm, x = find_norm(module), rows(1000, 96, torch.bfloat16)
    assert norm is not None
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(rms_norm(extension, norm, x, module.weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_a_copy_has_its_own_weight(extension):
    module = made(RmsStyle.ROUNDED, 64, torch.bfloat16)
    quick_norms(module)
    copy = deepcopy(module)
    copy.weight.zero_()
    x = rows(1, 64, torch.bfloat16)
    assert not copy(x).any()
    assert module(x).any()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(("dtype", "changed"), [("bf16", True), ("fp32", False)])
def test_loaded_models_have_the_kernel_where_it_serves(extension, tiny_dir, name, dtype, changed):
    model = load_model(tiny_dir(name), dtype=dtype, device="cpu")
    found = [m for m in model.hf.modules() if type(m).__name__.endswith("RMSNorm")]
    assert found
    assert all(("forward" in module.__dict__) == changed for module in found)
