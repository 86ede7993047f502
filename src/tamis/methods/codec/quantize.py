"""Uniform quantization of groups of numbers to few bits.

A group is stored as its smallest element `z` (the zero-point), a scale `s` and one code per
element, `x ~ code * s + z` with `0 <= code < 2**bits`. `z` is rounded down and `s` up to their
16-bit types, so that the codes reach every element of the group and no error exceeds `s / 2`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of scales and zero-points: bf16 for bf16 models, fp16 for others."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another floating-point type, its largest number in place of infinities."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def quantize(x: Tensor, dim: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize `x` in groups that each run along the whole dimension `dim`.

    Args:
        x: fp32, any shape. Elements beyond the range of `dtype` saturate.
        dim: a group is all elements that differ in this index only.
        bits: 1 to 8.
        dtype: of scales and zero-points, a 16-bit type.

    Returns:
        codes, uint8 like `x`; scale and zero-point, `dtype`, like `x` with length 1 at `dim`.
    """
    levels, limit = 2**bits - 1, torch.finfo(dtype).max
    x = x.clamp(-limit, limit)
    zero = _rounded(x.amin(dim, keepdim=True), dtype, down=True)
    span = x.amax(dim, keepdim=True) - zero.float()
    scale = _rounded(span / levels, dtype, down=False)
    # A constant group has scale 0: any divisor gives code 0, its exact value; 0 / 0 has no code.
    divisor = scale.float().where(scale > 0, 1.0)
    codes = ((x - zero.float()) / divisor).round().clamp(0, levels)
    return codes.to(torch.uint8), scale, zero


def _rounded(x: Tensor, dtype: torch.dtype, *, down: bool) -> Tensor:
    """`x` in a 16-bit type, rounded to the neighbour below or above rather than to the nearest."""
    nearest = saturated(x, dtype)
    wrong = nearest.float() > x if down else nearest.float() < x
    # The bits of floats of one sign ascend like integers, away from zero.
    bits = nearest.view(torch.int16)
    away = nearest <= 0 if down else nearest >= 0
    beside = torch.where(away, bits + 1, bits - 1)
    return torch.where(wrong, beside, bits).view(dtype)
