"""Uniform quantization of groups of numbers to few bits.

A group is stored as its smallest element `z` (the zero-point), a scale `s` and one code per
element, `x ~ code * s + z` with `0 <= code < 2**bits`. `z` is rounded down and `s` up to their
16-bit types, so that the codes reach every element of the group and no error exceeds `s / 2`.
"""

from __future__ import annotations

from functools import partial
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from tamis.attention.encoding import Quantized, pack, packed_bytes
from tamis.platform import NATIVE_DTYPES, native_for


def half_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of scales and zero-points: bf16 for bf16 models, fp16 for others."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another floating-point type, its largest number in place of infinities."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def encode(
    x: Tensor,
    rows: Quantized,
    half: torch.dtype,
    *,
    backend: str | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys or values as pages hold them that are `Quantized`.

    Args:
        x: [..., tokens, dim], fp32, fp16 or bf16. Elements beyond the range of `half` saturate.
        rows: bits and groups, which divide the tokens or the channels.
        half: the dtype of scales and zero-points, fp16 or bf16.
        backend: a name of `tamis.platform.BACKENDS`; None chooses.
        isa: an instruction set for the native backend; None for the best.

    Returns:
        codes, uint8 [..., tokens, packed_bytes(dim, bits)]; scales and zero-points, `half`,
        [..., tokens / group, dim] or [..., tokens, dim / group]. Every backend's are the same.

    Raises:
        ConfigError: `backend` is unknown or cannot run here.
        ValueError: groups that divide neither; another dtype.
    """
    along = -2 if rows.along == "tokens" else -1
    if x.shape[along] % rows.group or x.dtype not in NATIVE_DTYPES:
        raise ValueError(
            f"groups of {rows.group} {rows.along} cannot be made of {x.dtype} {list(x.shape)}"
        )
    extension = native_for(backend, x)
    run = _reference if extension is None else partial(_native, extension, isa)
    return run(x, rows, half)


def _reference(x: Tensor, rows: Quantized, half: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`encode` in plain torch, on any device."""
    along = -2 if rows.along == "tokens" else -1
    groups = torch.unflatten(x.float(), along, (-1, rows.group))
    codes, scale, zero = quantize(groups, along, rows.bits, half)
    packed = pack(codes.flatten(along - 1, along), rows.bits)
    return packed, scale.squeeze(along), zero.squeeze(along)


def _native(
    extension: ModuleType, isa: str | None, x: Tensor, rows: Quantized, half: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`encode` by the compiled extension, for tensors on the CPU."""
    x = x.detach().contiguous()
    *lead, tokens, dim = x.shape
    along_tokens = rows.along == "tokens"
    groups = (tokens // rows.group, dim) if along_tokens else (tokens, dim // rows.group)
    codes = x.new_empty((*lead, tokens, packed_bytes(dim, rows.bits)), dtype=torch.uint8)
    scale, zero = (x.new_empty((*lead, *groups), dtype=half) for _ in range(2))
    extension.quantize(
        isa or "",
        torch.get_num_threads(),
        NATIVE_DTYPES[x.dtype],
        NATIVE_DTYPES[half],
        along_tokens,
        prod(lead) * tokens,
        dim,
        rows.group,
        rows.bits,
        x.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
    )
    return codes, scale, zero


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
