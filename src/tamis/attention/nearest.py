"""Keys that are most similar to others, for methods that merge tokens."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tamis.platform import NATIVE_DTYPES, native_for

_BLOCK = 128  # keys that are compared with all others at once
_LEAST = 1e-12  # length of a key that is zero, as torch's `normalize` has it


def nearest(
    k: Tensor, among: Tensor, *, backend: str | None = None, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """For each key the one of others with the highest cosine similarity; never are all n x m
    similarities in memory.

    Args:
        k: [n, dim], fp32, fp16 or bf16.
        among: [m, dim] of the same dtype, at least one.
        backend: a name of `tamis.platform.BACKENDS`; None chooses.
        isa: an instruction set for the native backend; None for the best.

    Returns:
        The similarity, fp32 [n], and which of `among` has it, int64 [n].

    Raises:
        ConfigError: `backend` is unknown or cannot run here.
        ValueError: shapes or dtypes disagree, or there is none to choose among.
    """
    if k.shape[1:] != among.shape[1:] or k.dtype != among.dtype or not len(among):
        raise ValueError(
            f"k [n, dim] and among [m, dim] must fit, got {k.dtype} {list(k.shape)} and "
            f"{among.dtype} {list(among.shape)}"
        )
    extension = native_for(backend, k, among) if k.dtype in NATIVE_DTYPES else None
    run = _reference if extension is None else partial(_native, extension, isa)
    return run(k, among)


def _reference(k: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` in plain torch, on any device."""
    targets = normalize(among.float(), dim=-1)
    found = [
        (normalize(block.float(), dim=-1) @ targets.T).max(1) for block in torch.split(k, _BLOCK)
    ]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _native(
    extension: ModuleType, isa: str | None, k: Tensor, among: Tensor
) -> tuple[Tensor, Tensor]:
    """`nearest` by the compiled extension, for tensors on the CPU."""
    k, among = (x.detach().contiguous() for x in (k, among))
    scales = [1 / x.float().norm(dim=-1).clamp_min(_LEAST) for x in (k, among)]
    similarity, index = (torch.empty(len(k), dtype=t) for t in (torch.float32, torch.int64))
    extension.nearest(
        isa or "",
        torch.get_num_threads(),
        NATIVE_DTYPES[k.dtype],
        len(k),
        len(among),
        k.shape[1],
        k.data_ptr(),
        among.data_ptr(),
        scales[0].data_ptr(),
        scales[1].data_ptr(),
        similarity.data_ptr(),
        index.data_ptr(),
    )
    return similarity, index
