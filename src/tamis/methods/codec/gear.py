"""GEAR: a quantized backbone, a low-rank approximation of its error, and outliers kept exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tamis.attention.encoding import PageEncoding, restore
from tamis.attention.quantize import half_dtype, saturated
from tamis.errors import PlanError
from tamis.methods.base import param
from tamis.methods.codec.kivi import KIVI
from tamis.methods.views import Column, LayerView

POWER_ITERATIONS = 3


@dataclass(frozen=True)
class GEAR(KIVI):
    """`X ~ D + L + S`: `S` holds the outliers of X, `D` quantizes what they leave, and `L` is the
    best approximation of rank `rank` of the error `R = X - D - S`, head by head.

    `S = Filter_s(X)` holds the share `s` of the elements that stick out of their vector, a channel
    of keys or a token of values; `D = Quant_b(X - S)` with KIVI's groups; `L = A B^T` by power
    iterations on R (the solver is the paper's). Defaults: the paper's 4 bits, groups of
    64, s = 2 %, rank 4, a streaming buffer of n_b = 20 tokens.

    Departures: all three parts are made per page and head. In the paper prompts are compressed
    whole and generated tokens by groups of n_b with rank 2; here `residual` is n_b, and the exact
    tokens beyond it are less than a page. A page has too few tokens for s / 2 per cent of each
    channel, so the page's elements farthest from their vector's median are the outliers, as many
    in every page; in `D` the median stands in their place, which stretches no group. They are
    stored as what they exceed `D + L` by, in 16 bits. Power iterations begin at the same
    random matrix every time. The factors are rounded to 16 bits. `sparsity=0` is the paper's
    GEAR-L.

    A token costs, beside KIVI's bytes, `2 * rank * (2 + (k_dim + v_dim) / page_size)` bytes for
    `L`, and four for each outlier (six where a page has more than 32768 elements).
    """

    paper: ClassVar[str] = (
        "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference "
        "of LLM (arXiv:2403.05527)"
    )

    bits: int = param(4, "bits per element", choices=(1, 2, 3, 4, 8))
    group_size: int = param(64, "elements that share a scale and a zero-point", minimum=1)
    residual: int = param(20, "last tokens that stay exact", minimum=0)
    rank: int = param(4, "rank of the approximation of the error", minimum=1)
    sparsity: float = param(0.02, "share of the elements that stay exact", minimum=0, maximum=0.5)

    def columns(self, page_size: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> list[Column]:
        columns = super().columns(page_size, k_dim, v_dim, dtype)
        most = min(page_size, k_dim, v_dim)
        if self.rank > most:
            raise PlanError(
                f"{self}: pages of {page_size} tokens with heads of {k_dim} and {v_dim} channels "
                f"have no error of rank {self.rank}; rank must be at most {most}"
            )
        half = half_dtype(dtype)
        for name, dim in (("k", k_dim), ("v", v_dim)):
            columns += [
                Column(f"{name}_left", half, self.rank),
                Column(f"{name}_right", half, dim, rows=self.rank),
            ]
            if count := self._outliers(page_size * dim):
                columns += [
                    Column(f"{name}_places", _index_dtype(page_size * dim), count, rows=1),
                    Column(f"{name}_outliers", half, count, rows=1),
                ]
        return columns

    def encode(self, k: Tensor, v: Tensor, view: LayerView) -> dict[str, Tensor]:
        half = half_dtype(k.dtype)
        k, v = k.float(), v.float()
        k_median = k.median(2, keepdim=True).values.expand_as(k)
        v_median = v.median(3, keepdim=True).values.expand_as(v)
        k_places, v_places = self._places(k, k_median), self._places(v, v_median)
        page = self.quantized(_put(k, k_places, k_median), _put(v, v_places, v_median), half)
        backbone = restore(page, super().encoding())
        sides = zip("kv", (k, v), (k_places, v_places), backbone, strict=True)
        for name, x, places, read in sides:
            left, right = _low_rank(_put(x - read, places, torch.zeros_like(x)), self.rank)
            left, right = left.to(half), saturated(right, half)
            page[f"{name}_left"], page[f"{name}_right"] = left, right
            if places.shape[-1]:
                missing = x - (read + left.float() @ right.float())
                outliers = missing.flatten(2).gather(2, places)[:, :, None]
                page[f"{name}_places"] = places[:, :, None].to(_index_dtype(x[0, 0].numel()))
                page[f"{name}_outliers"] = saturated(outliers, half)
        return page

    def encoding(self) -> PageEncoding:
        backbone, outliers = super().encoding(), self.sparsity > 0
        return PageEncoding(
            replace(backbone.k, low_rank=True, outliers=outliers),
            replace(backbone.v, low_rank=True, outliers=outliers),
        )

    def _outliers(self, elements: int) -> int:
        """Outliers of a page of so many elements."""
        return round(self.sparsity * elements)

    def _places(self, x: Tensor, median: Tensor) -> Tensor:
        """Where in each page the outliers are, int64 [kv_heads, pages, outliers]."""
        distance = (x - median).abs().flatten(2)
        return distance.topk(self._outliers(distance.shape[2]), dim=2).indices


def _put(x: Tensor, places: Tensor, source: Tensor) -> Tensor:
    """`x` with the elements at `places` of each page taken from `source`, both of its shape."""
    chosen = source.flatten(2).gather(2, places)
    return x.flatten(2).scatter(2, places, chosen).view_as(x)


def _low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [.., n, rank] and [.., rank, d] of an approximation of `x` [.., n, d], fp32."""
    start = torch.randn(x.shape[-1], rank, generator=torch.Generator().manual_seed(0))
    right = start.to(x.device).expand(*x.shape[:-2], -1, -1)
    for _ in range(POWER_ITERATIONS):
        left = torch.linalg.qr(x @ right).Q
        right = x.mT @ left
    return left, right.mT


def _index_dtype(elements: int) -> torch.dtype:
    """The smallest integer type that numbers so many elements."""
    return torch.int16 if elements <= 2**15 else torch.int32
