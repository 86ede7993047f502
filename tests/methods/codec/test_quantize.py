"""Groups of numbers become few bits, never further off than half a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.methods.codec.quantize import quantize

HALVES = [torch.float16, torch.bfloat16]


def worst_error(x: Tensor, bits: int, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """The errors of `x` quantized along its last dimension, and the scales."""
    codes, scale, zero = quantize(x, -1, bits, half)
    assert int(codes.max()) < 2**bits
    return (codes.float() * scale.float() + zero.float() - x).abs(), scale.float()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_no_error_exceeds_half_a_scale(half: torch.dtype, bits: int, size: float) -> None:
    torch.manual_seed(bits)
    x = torch.randn(64, 16).clamp(-2, 2) * size + torch.randn(64, 1).clamp(-0.1, 0.1) * size
    error, scale = worst_error(x, bits, half)
    assert (error <= scale / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("half", HALVES)
def test_the_scale_is_the_range_over_the_levels_but_for_its_rounding(half: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    _, scale, zero = quantize(x, 1, 4, half)
    torch.testing.assert_close(zero.float(), x.amin(1, keepdim=True), rtol=0.01, atol=0)
    span = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    torch.testing.assert_close(scale.float(), span / 15, rtol=0.02, atol=0)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.14159, 1e-7, -1e-7, 6e4, -6e4])
def test_constant_groups_are_exact(half: torch.dtype, value: float) -> None:
    x = torch.full((3, 8), value).to(half).float()
    codes, scale, zero = quantize(x, 1, 2, half)
    assert codes.max() == 0
    assert scale.max() == 0
    assert torch.equal(zero.float().expand(3, 8), x)


def test_values_beyond_the_half_type_saturate() -> None:
    x = torch.tensor([[1e9, -1e9, 0.0, 2.0], [torch.inf, -torch.inf, 5.0, 5.0]])
    codes, scale, zero = quantize(x, 1, 8, torch.float16)
    read = codes.float() * scale.float() + zero.float()
    assert read.isfinite().all()
    assert (read[:, 0] > 6.5e4).all()
    assert (read[:, 1] < -6.5e4).all()


def test_bf16_reaches_far() -> None:
    x = torch.tensor([[1e30, -1e30, 0.0, 5e29]])
    error, scale = worst_error(x, 8, torch.bfloat16)
    assert (error <= scale / 2 * (1 + 1e-4)).all()
