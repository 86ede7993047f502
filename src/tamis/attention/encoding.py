"""How encoded pages hold keys and values, described so that attention can read them as they are.

A codec's pages have fields whose names begin with `k_` or `v_` (`k`, `v` for plain rows). An
`Encoding` says which there are and how to read them; widths and ranks are those of the fields.
Codes are packed into 16-bit words, plane by plane (`pack`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """Rows of elements: the field `k` or `v`, [page_size, dim]."""


@dataclass(frozen=True)
class Pruned:
    """Rows of the key channels that stay, the others zero: `k_kept` [page_size, kept], and which
    they are, `k_mask`, uint8 [1, k_dim]."""


@dataclass(frozen=True)
class Quantized:
    """Codes `c` that mean `c * scale + zero`: `k_codes`, uint8 [page_size, bytes], as `pack` packs
    them, and `k_scale` and `k_zero`, one number per group.

    Attributes:
        bits: of a code, 1 to 8.
        group: elements that share a scale and a zero-point.
        along: whether a group is some tokens of one channel (scales [page_size / group, dim]) or
            some channels of one token (scales [page_size, dim / group]).
    """

    bits: int
    group: int
    along: Literal["tokens", "channels"]


@dataclass(frozen=True)
class Encoding:
    """The keys or the values of a page: rows, and what is added to them. All floating-point fields
    of the keys have one dtype, and all of the values.

    Attributes:
        rows: how the rows are stored.
        low_rank: whether a product of two factors is added: `k_left` [page_size, rank] times
            `k_right` [rank, dim].
        outliers: whether numbers are added at single places: `k_outliers` [1, n] at `k_places`,
            int16 or int32 [1, n], which number the elements of the page, [page_size, dim].
    """

    rows: Plain | Pruned | Quantized
    low_rank: bool = False
    outliers: bool = False


@dataclass(frozen=True)
class PageEncoding:
    """How a page's keys and values are stored. Values are not `Pruned`."""

    k: Encoding
    v: Encoding

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that it reads."""
        return (*_fields("k", self.k), *_fields("v", self.v))


def restore(page: dict[str, Tensor], encoding: PageEncoding) -> tuple[Tensor, Tensor]:
    """Keys and values of encoded pages, fp32 [..., page_size, dim], from their fields, [..., rows,
    width] each."""
    return _restored(page, "k", encoding.k), _restored(page, "v", encoding.v)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension into 16-bit words, `16 // bits` (a plane each) per word.

    Code `p * words + h` lies in bits `p * bits ..` of word `h`, so that one shift and one mask of
    the words give `words` neighbouring codes. Words whose bits the codes do not fill end with
    zeros: 3 bits take 3.2.

    Args:
        codes: uint8 [..., n] below `2**bits`.
        bits: 1 to 8.

    Returns:
        uint8 [..., 2 * words], words = ceil(n / (16 // bits)).
    """
    planes = 16 // bits
    missing = -codes.shape[-1] % planes
    padded = torch.nn.functional.pad(codes, (0, missing)).to(torch.int32)
    shifts = torch.arange(0, planes * bits, bits, device=codes.device, dtype=torch.int32)
    words = (torch.unflatten(padded, -1, (planes, -1)) << shifts[:, None]).sum(-2)
    return words.to(torch.int16).contiguous().view(torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The `n` codes that `pack` packed into each row, uint8 [..., n]."""
    words = packed.contiguous().view(torch.int16).to(torch.int32)
    planes = 16 // bits
    shifts = torch.arange(0, planes * bits, bits, device=packed.device, dtype=torch.int32)
    codes = (words[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :n].to(torch.uint8)


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of a row of `n` packed codes."""
    return -(-n // (16 // bits)) * 2


def _fields(name: str, encoding: Encoding) -> list[str]:
    if isinstance(encoding.rows, Plain):
        names = [name]
    elif isinstance(encoding.rows, Pruned):
        names = [f"{name}_kept", f"{name}_mask"]
    else:
        names = [f"{name}_codes", f"{name}_scale", f"{name}_zero"]
    if encoding.low_rank:
        names += [f"{name}_left", f"{name}_right"]
    if encoding.outliers:
        names += [f"{name}_places", f"{name}_outliers"]
    return names


def _restored(page: dict[str, Tensor], name: str, encoding: Encoding) -> Tensor:
    rows = encoding.rows
    if isinstance(rows, Quantized):
        x = _dequantized(page, name, rows)
    elif isinstance(rows, Pruned):
        x = _unpruned(page[f"{name}_kept"], page[f"{name}_mask"])
    else:
        x = page[name].float()
    if encoding.low_rank:
        x = x + page[f"{name}_left"].float() @ page[f"{name}_right"].float()
    if encoding.outliers:
        places, added = (page[f"{name}_{what}"].squeeze(-2) for what in ("places", "outliers"))
        flat = x.flatten(-2)
        x = flat.scatter_add(-1, places.long(), added.float()).view_as(x)
    return x


def _dequantized(page: dict[str, Tensor], name: str, rows: Quantized) -> Tensor:
    scale, zero = (page[f"{name}_{what}"].float() for what in ("scale", "zero"))
    along = -2 if rows.along == "tokens" else -1
    dim = scale.shape[-1] * (rows.group if along == -1 else 1)
    codes = torch.unflatten(unpack(page[f"{name}_codes"], rows.bits, dim), along, (-1, rows.group))
    grouped = torch.addcmul(zero.unsqueeze(along), codes.float(), scale.unsqueeze(along))
    return grouped.flatten(along - 1, along)


def _unpruned(kept: Tensor, mask: Tensor) -> Tensor:
    order = mask.argsort(dim=-1, descending=True, stable=True)
    channels = order[..., : kept.shape[-1]].expand_as(kept)
    zeros = torch.zeros(*kept.shape[:-1], mask.shape[-1], device=kept.device)
    return zeros.scatter(-1, channels, kept.float())
