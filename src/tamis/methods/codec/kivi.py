"""KIVI: keys quantized per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tamis.attention.encoding import Encoding, PageEncoding, Quantized, packed_bytes
from tamis.attention.quantize import encode, half_dtype
from tamis.errors import PlanError
from tamis.methods.base import Codec, param
from tamis.methods.views import Column, LayerView


@dataclass(frozen=True)
class KIVI(Codec):
    """Keys have outlier channels and values have none, so keys are quantized along tokens, channel
    by channel, and values along channels, token by token.

    A group of `group_size` elements is stored as `Q(x) = round((x - z) / s)` with `z = min x` and
    `s = (max x - min x) / (2**bits - 1)`, and read as `Q(x) * s + z` (its section on
    methodology and algorithm 1). Defaults: the paper's 2 bits, groups of 32, residual length
    R = 128.

    Departures: the paper quantizes keys R at a time, so that between 0 and R - 1 of the last keys
    (`l mod R`) and exactly R of the last values are exact. Here keys and values are encoded
    together, page by page, when all of a page is older than `residual`: at least the last
    `residual` tokens of both are exact, and less than one page more. The paper's prompt is
    attended before it is quantized, and so it is here. `z` is rounded down and `s` up to 16 bits,
    so that no error exceeds `s / 2`; constant groups of 16-bit numbers are exact.

    Codes lie along channels, `16 // bits` per 16-bit word (`tamis.attention.encoding.pack`). A
    token costs `(k_dim + v_dim) * (bits + 32 / group_size) / 8` bytes, but that rows of codes end
    with whole words, of which 3-bit codes fill 15 bits.
    """

    paper: ClassVar[str] = (
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv:2402.02750)"
    )

    bits: int = param(2, "bits per element", choices=(1, 2, 3, 4, 8))
    group_size: int = param(32, "elements that share a scale and a zero-point", minimum=1)
    residual: int = param(128, "last tokens that stay exact", minimum=0)

    def columns(self, page_size: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> list[Column]:
        if page_size % self.group_size or v_dim % self.group_size:
            raise PlanError(
                f"{self}: groups of {self.group_size} do not divide pages of {page_size} tokens "
                f"and values of {v_dim} channels; group_size={gcd(page_size, v_dim)} would"
            )
        half, key_groups = half_dtype(dtype), page_size // self.group_size
        return [
            Column("k_codes", torch.uint8, packed_bytes(k_dim, self.bits)),
            Column("k_scale", half, k_dim, rows=key_groups),
            Column("k_zero", half, k_dim, rows=key_groups),
            Column("v_codes", torch.uint8, packed_bytes(v_dim, self.bits)),
            Column("v_scale", half, v_dim // self.group_size),
            Column("v_zero", half, v_dim // self.group_size),
        ]

    def encode(self, k: Tensor, v: Tensor, view: LayerView) -> dict[str, Tensor]:
        return self.quantized(k, v, half_dtype(k.dtype))

    def encoding(self) -> PageEncoding:
        return PageEncoding(
            Encoding(self._along("tokens")),
            Encoding(self._along("channels")),
        )

    def quantized(self, k: Tensor, v: Tensor, half: torch.dtype) -> dict[str, Tensor]:
        """The fields of `columns` for keys and values, scales and zero-points in `half`."""
        k_codes, k_scale, k_zero = encode(k, self._along("tokens"), half)
        v_codes, v_scale, v_zero = encode(v, self._along("channels"), half)
        return {
            "k_codes": k_codes,
            "k_scale": k_scale,
            "k_zero": k_zero,
            "v_codes": v_codes,
            "v_scale": v_scale,
            "v_zero": v_zero,
        }

    def _along(self, along: Literal["tokens", "channels"]) -> Quantized:
        return Quantized(self.bits, self.group_size, along)
