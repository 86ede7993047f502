"""What the functions of `observe` demand of their arguments, and which backend runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch

from tamis.attention import observe_native, observe_reference
from tamis.attention.checks import check_paged
from tamis.cache.format import PagedKV
from tamis.platform import native_for, triton_for


def implementation(
    name: str, backend: str | None, q: torch.Tensor, kv: PagedKV
) -> Callable[..., torch.Tensor]:
    """The function `name` of `observe_native`, `gpu.observe` or `observe_reference`, as
    `native_for` and `triton_for` choose; those that Triton lacks run in plain torch."""
    extension = native_for(backend, q, kv.data)
    if extension is not None:
        return partial(getattr(observe_native, name), extension)
    module: ModuleType = observe_reference
    if triton_for(backend, q, kv.data):
        from tamis.attention.gpu import observe as module  # takes seconds to import
    function: Callable[..., torch.Tensor] = getattr(module, name, getattr(observe_reference, name))
    return function


def longest(kv: PagedKV) -> int:
    """The length of the longest head of `kv`."""
    return int(kv.lengths.max()) if kv.lengths.numel() else 0


def check_row(q: torch.Tensor, kv: PagedKV) -> None:
    """Raise ValueError unless `kv` is one row that queries `q` can read."""
    check_paged(q, kv)
    if kv.lengths.shape[0] != 1:
        raise ValueError(f"kv must be one row of pages, got {kv.lengths.shape[0]}")


def check_rows(q: torch.Tensor, kv: PagedKV) -> None:
    """Raise ValueError unless row `i` of `q` can read row `i` of `kv`."""
    check_paged(q, kv)
    if q.shape[0] != kv.lengths.shape[0]:
        raise ValueError(f"{q.shape[0]} queries cannot read {kv.lengths.shape[0]} rows of pages")


def check_lse(q: torch.Tensor, lse: torch.Tensor) -> None:
    """Raise ValueError unless `lse` has one fp32 number for each query and head of `q`."""
    if lse.shape != q.shape[:2] or lse.dtype != torch.float32:
        raise ValueError(
            f"lse must be float32 {list(q.shape[:2])}, got {lse.dtype} {list(lse.shape)}"
        )
