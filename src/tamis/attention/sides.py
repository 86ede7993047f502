"""Where the keys and the values of an encoded page lie, for kernels that read them as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tamis.attention.encoding import Encoding, Plain, Pruned, Quantized
from tamis.cache.format import PageFormat


@dataclass(frozen=True)
class SideLayout:
    """The keys or the values of a page. Offsets are bytes from the page's start.

    Attributes:
        rows: how the rows are stored.
        floats: dtype of the scales, of elements and of corrections.
        numbers: dtype of the places of outliers.
        dim: channels.
        elements: offset of the rows, or of their codes.
        scale, zero: offsets, of quantized rows.
        kept: channels of pruned rows, 0 where rows are whole; mask: offset of their mask.
        rank: of a low-rank product, 0 for none; left, right: offsets of its factors.
        outliers: per page, 0 for none; places, added: offsets.
    """

    rows: Plain | Pruned | Quantized
    floats: torch.dtype
    numbers: torch.dtype
    dim: int
    elements: int
    scale: int = 0
    zero: int = 0
    kept: int = 0
    mask: int = 0
    rank: int = 0
    left: int = 0
    right: int = 0
    outliers: int = 0
    places: int = 0
    added: int = 0


def side_layout(format: PageFormat, name: str, encoding: Encoding) -> SideLayout:
    """The keys (`name` "k") or values ("v") of pages of `format`."""
    rows, at = encoding.rows, format.offsets
    known: dict[str, int] = {}
    if isinstance(rows, Quantized):
        of = format.field(f"{name}_scale")
        dim = of.width * (1 if rows.along == "tokens" else rows.group)
        elements = at[f"{name}_codes"]
        known = {"scale": at[f"{name}_scale"], "zero": at[f"{name}_zero"]}
    elif isinstance(rows, Pruned):
        of, mask = format.field(f"{name}_kept"), format.field(f"{name}_mask")
        dim, elements = mask.width, at[of.name]
        known = {"kept": of.width, "mask": at[mask.name]}
    else:
        of = format.field(name)
        dim, elements = of.width, at[name]
    if encoding.low_rank:
        left, right = f"{name}_left", f"{name}_right"
        known |= {"rank": format.field(left).width, "left": at[left], "right": at[right]}
    numbers = torch.int16
    if encoding.outliers:
        places = format.field(f"{name}_places")
        numbers = places.dtype
        known |= {"outliers": places.width, "places": at[places.name]}
        known["added"] = at[f"{name}_outliers"]
    return SideLayout(rows, of.dtype, numbers, dim, elements, **known)
