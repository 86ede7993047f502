"""Keys turned by angles, pair by pair, once `tamis.model.shift` knows the angles."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from tamis.platform import NATIVE_DTYPES, native_for


def rotate(
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    angle: Tensor,
    *,
    interleaved: bool,
    backend: str | None = None,
    isa: str | None = None,
) -> Tensor:
    """Keys whose pairs (a, b) become (a cos - b sin, b cos + a sin) (arXiv 2104.09864, eq. 34).

    Args:
        k: keys [..., tokens, k_dim], fp32, fp16 or bf16.
        cos, sin: fp32 [angles, pairs]; 2 * pairs elements are turned, those after them stay.
        angle: which of the angles each token turns by, int64 [tokens].
        interleaved: pairs are elements (2i, 2i + 1), not (i, i + pairs).
        backend: a name of `tamis.platform.BACKENDS`; None chooses.
        isa: an instruction set for the native backend; None for the best.

    Returns:
        Like `k`, computed in fp32 and rounded once.

    Raises:
        ConfigError: `backend` is unknown or cannot run here.
    """
    extension = native_for(backend, k, cos) if k.dtype in NATIVE_DTYPES else None
    run = _reference if extension is None else partial(_native, extension, isa)
    return run(k, cos, sin, angle, interleaved)


def _reference(k: Tensor, cos: Tensor, sin: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """`rotate` in plain torch, on any device."""
    cos, sin = cos[angle], sin[angle]  # [tokens, pairs]
    n = cos.shape[-1]
    shape, axis = ((n, 2), -1) if interleaved else ((2, n), -2)
    pairs = k[..., : 2 * n].float().reshape(*k.shape[:-1], *shape)
    a, b = pairs.unbind(axis)  # [..., tokens, n]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=axis).flatten(-2)
    return torch.cat([turned.to(k.dtype), k[..., 2 * n :]], dim=-1)


def _native(
    extension: ModuleType,
    isa: str | None,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    angle: Tensor,
    interleaved: bool,
) -> Tensor:
    """`rotate` by the compiled extension, for tensors on the CPU."""
    k, cos, sin, angle = (x.detach().contiguous() for x in (k, cos, sin, angle))
    tokens, dim = k.shape[-2:]
    out = torch.empty_like(k)
    extension.rotate_keys(
        isa or "",
        torch.get_num_threads(),
        NATIVE_DTYPES[k.dtype],
        k.numel() // dim,
        tokens,
        dim,
        cos.shape[1],
        interleaved,
        k.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        angle.data_ptr(),
        out.data_ptr(),
    )
    return out
