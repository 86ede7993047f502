"""The kernel of linear layers with weights in int8: as with the same weights in the rows' dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tamis.model import linear as layers
from tamis.model import load_model
from tamis.model.fused import FusedLayer
from tamis.model.linear import FEW_ROWS, linear, max_rows, small_batches
from tamis.model.quantized import matrix_of, quantize_weights
from tests.instruction_sets import isas

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half the distance of neighbours just above 1: the most that one rounding changes them."""


def operands(rows: int, width: int, out: int, dtype: torch.dtype = torch.bfloat16):
    """x [rows, width], weight int8 [out, width] of all values, bias [out], scales [out]."""
    made = torch.Generator().manual_seed(rows * 7 + width * 3 + out)
    x = torch.randn(rows, width, generator=made).to(dtype)
    weight = torch.randint(-128, 128, (out, width), generator=made, dtype=torch.int8)
    bias = torch.randn(out, generator=made).to(dtype)
    return x, weight, bias, 0.01 + 0.01 * torch.rand(out, generator=made)


def assert_rounded_once(y: Tensor, x: Tensor, weight: Tensor, bias, scales: Tensor) -> None:
    """`y` is the exact sum, off by one rounding and by what fp32 loses while adding."""
    w = weight.double() * scales.double()[:, None]
    added = 0 if bias is None else bias.double()
    wanted = x.double() @ w.T + added
    most = x.double().abs() @ w.abs().T + (0 if bias is None else added.abs())
    assert ((y.double() - wanted).abs() <= EPS[y.dtype] * wanted.abs() + 2.0**-20 * most).all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 10), FEW_ROWS, 67])
def test_sums_are_exact_but_for_one_rounding(extension, isa, dtype, rows):
    x, weight, bias, scales = operands(rows, 136, 40, dtype)
    y = linear(extension, x, weight, bias, scales, isa=isa)
    assert_rounded_once(y, x, weight, bias, scales)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "out"), [(1, 1), (7, 2), (31, 17), (33, 15), (47, 16), (67, 3), (129, 101)]
)
def test_widths_need_not_fill_vectors(extension, isa, dtype, width, out):
    for rows in (1, 2, 3, 7):
        x, weight, bias, scales = operands(rows, width, out, dtype)
        for its_bias in (None, bias):
            y = linear(extension, x, weight, its_bias, scales, isa=isa)
            assert_rounded_once(y, x, weight, its_bias, scales)


@pytest.mark.parametrize("isa", isas())
def test_a_row_does_not_see_the_others(extension, isa):
    x, weight, bias, scales = operands(FEW_ROWS, 300, 70)
    together = linear(extension, x, weight, bias, scales, isa=isa)
    for first in range(FEW_ROWS):
        for rows in (1, 2, 3, 5):
            part = x[first : first + rows]
            alone = linear(extension, part, weight, bias, scales, isa=isa)
            assert torch.equal(alone, together[first : first + rows])


def test_threads_do_not_change_the_bits(extension):
    x, weight, bias, scales = operands(3, 512, 213)
    one = linear(extension, x, weight, bias, scales)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(linear(extension, x, weight, bias, scales), one)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_meet_the_kernel_and_many_torchaos(extension, monkeypatch, dtype):
    module = nn.Linear(64, 48, dtype=dtype)
    quantize_weights(module, "int8")
    small_batches(module)
    calls: list[int] = []

    def counted(extension, x, *rest):
        calls.append(x.numel() // x.shape[-1])
        return linear(extension, x, *rest)

    monkeypatch.setattr(layers, "linear", counted)
    matrix, most = matrix_of(module.weight), max_rows(dtype)
    for rows in (1, most, most + 1):
        x, _, _, _ = operands(rows, 64, 1, dtype)
        y = module(x[None])[0]
        if rows <= most:
            assert_rounded_once(y, x, matrix.weight, module.bias, matrix.scales.flatten())
        else:
            by_torchao = nn.Linear.forward(module, x)
            assert torch.equal(y, by_torchao)
    assert calls == [1, most]


@torch.no_grad()
def test_the_layers_of_a_model_run_few_rows_in_int8(extension, tiny_dir):
    model = load_model(tiny_dir("qwen3"), dtype="bf16", device="cpu", weights="int8")
    quick = [layer.__dict__.get("forward") for layer in model.decoder_layers]
    assert all(type(forward) is FusedLayer for forward in quick)


@torch.no_grad()
def test_int4_keeps_torchs_kernels(extension):
    module = nn.Linear(64, 48, dtype=torch.bfloat16)
    quantize_weights(module, "int4")
    small_batches(module)
    assert matrix_of(module.weight) is None
    assert "forward" not in module.__dict__
