"""The keys or the values of encoded pages as Triton kernels read them.

A tile's columns are channels in the order in which words of codes give them: `words` neighbouring
channels from each plane, the words padded to a power of two (`tamis.attention.encoding.pack`). So
codes are shifted out of the words in registers, and no element is moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tamis.attention.encoding import Encoding, Quantized
from tamis.attention.gpu.tiles import MIN_DOT, dot, padded
from tamis.attention.sides import side_layout
from tamis.cache.format import UNIT, PageFormat

PRECISION = tl.constexpr("tf32x3")
"""Of the products: nearly fp32's, on tensor cores, for codecs must not lose more than they say."""

OUTLIERS = tl.constexpr(64)
"""Outliers of a page that meet a tile at once."""


@dataclass(frozen=True)
class Side:
    """The keys or the values of a page, known when a kernel is compiled. Offsets from the page's
    start and `*_unit`, what a page id counts, are in elements of the field's dtype.

    Attributes:
        floats: dtype of the scales, of elements and of corrections.
        numbers: dtype of the places of outliers.
        dim: channels.
        columns: of a tile, a power of two; words, words_padded: of a row, here and in a tile.
        codes: whether rows are codes of `bits`, which lie at `elements` as other rows do.
        by_channel: whether groups of `group` elements are tokens of one channel, not channels of
            one token.
        spread: whether a token's scales become a tile's columns by repeating each `group` times.
        scale, zero: offsets.
        kept: channels of pruned rows, 0 where rows are whole; mask: offset of their mask.
        rank: of a low-rank product, 0 for none; left, right: offsets of its factors.
        outliers: per page, 0 for none; places, added: offsets.
    """

    floats: torch.dtype
    numbers: torch.dtype
    dim: int
    columns: int
    words: int
    words_padded: int
    elements: int
    unit: int
    numbers_unit: int
    codes: bool = False
    bits: int = 1
    by_channel: bool = False
    group: int = 1
    spread: bool = False
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


def side(format: PageFormat, name: str, encoding: Encoding) -> Side:
    """The keys (`name` "k") or values ("v") of pages of `format`."""
    of = side_layout(format, name, encoding)
    size = of.floats.itemsize
    words, columns = of.dim, padded(of.dim)
    words_padded, elements = columns, of.elements // size
    codes: dict[str, int | bool] = {}
    if isinstance(of.rows, Quantized):
        planes, by_channel, group = 16 // of.rows.bits, of.rows.along == "tokens", of.rows.group
        words, elements = -(-of.dim // planes), of.elements // 2
        # At least so many that a tile's columns can meet in a matrix product.
        words_padded = max(_power(words), MIN_DOT // _power(planes))
        columns = words_padded * _power(planes)
        codes = {
            "codes": True,
            "bits": of.rows.bits,
            "by_channel": by_channel,
            "group": group,
            "spread": not by_channel and columns == of.dim and group == _power(group),
        }
    return Side(
        floats=of.floats,
        numbers=of.numbers,
        dim=of.dim,
        columns=columns,
        words=words,
        words_padded=words_padded,
        elements=elements,
        unit=UNIT // size,
        numbers_unit=UNIT // of.numbers.itemsize,
        scale=of.scale // size,
        zero=of.zero // size,
        kept=of.kept,
        mask=of.mask,
        rank=of.rank,
        left=of.left // size,
        right=of.right // size,
        outliers=of.outliers,
        places=of.places // of.numbers.itemsize,
        added=of.added // size,
        **codes,  # type: ignore[arg-type]
    )


def _power(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


@triton.jit
def column_channels(SIDE: tl.constexpr):
    """The channel of each column of a tile, and whether there is one: [columns] each."""
    column = tl.arange(0, SIDE.columns)
    word = column % SIDE.words_padded
    channel = column // SIDE.words_padded * SIDE.words + word
    return channel, (word < SIDE.words) & (channel < SIDE.dim)


@triton.jit
def restored(
    page,
    start,
    octets,
    words,
    floats,
    numbers,
    SIDE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The tokens start .. start + TILE - 1 of a page, fp32 [TILE, columns], finite beyond its end.

    `octets`, `words`, `floats` and `numbers` are the arena in elements of uint8, int16 and the
    side's two dtypes.
    """
    slot = start + tl.arange(0, TILE)
    known = slot < PAGE
    channel, real = column_channels(SIDE)
    both = known[:, None] & real[None, :]
    field = floats + page * SIDE.unit
    if SIDE.codes:
        x = _dequantized(page, start, words, field, SIDE, PAGE, TILE)
    elif SIDE.kept:
        # A channel's place among those that stay is the number of those before it.
        stays = tl.load(octets + page * 64 + SIDE.mask + channel, mask=real, other=0).to(tl.int32)
        place = tl.cumsum(stays, 0) - stays
        x = tl.load(
            field + SIDE.elements + slot[:, None] * SIDE.kept + place[None, :],
            mask=both & (stays != 0)[None, :],
            other=0.0,
        ).to(tl.float32)
    else:
        at = SIDE.elements + slot[:, None] * SIDE.dim + channel[None, :]
        x = tl.load(field + at, mask=both, other=0.0).to(tl.float32)
    for r in range(SIDE.rank):
        left = tl.load(field + SIDE.left + slot * SIDE.rank + r, mask=known, other=0.0)
        right = tl.load(field + SIDE.right + r * SIDE.dim + channel, mask=real, other=0.0)
        x += left.to(tl.float32)[:, None] * right.to(tl.float32)[None, :]
    for first in range(0, SIDE.outliers, OUTLIERS):
        x += _outliers(page, slot, first, field, numbers, SIDE)
    return x


@triton.jit
def _outliers(page, slot, first, field, numbers, SIDE: tl.constexpr):
    """What the page's outliers from number `first` on add to a tile: fp32 [TILE, columns]."""
    channel, real = column_channels(SIDE)
    number = first + tl.arange(0, OUTLIERS)
    here = number < SIDE.outliers
    place = tl.load(
        numbers + page * SIDE.numbers_unit + SIDE.places + number, mask=here, other=0
    ).to(tl.int32)
    added = tl.load(field + SIDE.added + number, mask=here, other=0.0).to(tl.float32)
    # Each is at one token and one channel: two matrices with a one per outlier.
    token = (slot[:, None] == (place // SIDE.dim)[None, :]).to(tl.float32)
    mine = ((place % SIDE.dim)[:, None] == channel[None, :]) & real[None, :]
    return dot(token, tl.where(mine, added[:, None], 0.0), PRECISION)


@triton.jit
def _dequantized(
    page,
    start,
    words,
    field,
    SIDE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Codes times scales plus zero-points, fp32 [TILE, columns]; zero where there is no channel."""
    slot = start + tl.arange(0, TILE)
    known = slot < PAGE
    channel, real = column_channels(SIDE)
    word = tl.arange(0, SIDE.words_padded)
    packed = tl.load(
        words + page * 32 + SIDE.elements + slot[:, None] * SIDE.words + word[None, :],
        mask=known[:, None] & (word < SIDE.words)[None, :],
        other=0,
    ).to(tl.int32)
    shift = tl.arange(0, SIDE.columns // SIDE.words_padded) * SIDE.bits
    planes = (packed[:, None, :] >> shift[None, :, None]) & ((1 << SIDE.bits) - 1)
    codes = tl.reshape(planes, [TILE, SIDE.columns]).to(tl.float32)
    if SIDE.by_channel and SIDE.group % TILE == 0:  # one group for all tokens of the tile
        at = (start // SIDE.group) * SIDE.dim + channel[None, :]
        mask = real[None, :]
    elif SIDE.by_channel:
        at = (slot // SIDE.group)[:, None] * SIDE.dim + channel[None, :]
        mask = known[:, None] & real[None, :]
    elif SIDE.spread:
        group = tl.arange(0, SIDE.dim // SIDE.group)
        at = slot[:, None] * (SIDE.dim // SIDE.group) + group[None, :]
        mask = known[:, None] & (group >= 0)[None, :]
    else:
        at = slot[:, None] * (SIDE.dim // SIDE.group) + (channel // SIDE.group)[None, :]
        mask = known[:, None] & real[None, :]
    scale = tl.load(field + SIDE.scale + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(field + SIDE.zero + at, mask=mask, other=0.0).to(tl.float32)
    if SIDE.spread:
        scale, zero = _spread(scale, SIDE, TILE), _spread(zero, SIDE, TILE)
    return codes * scale + zero


@triton.jit
def _spread(x, SIDE: tl.constexpr, TILE: tl.constexpr):
    """Numbers of groups of channels [TILE, groups], one per channel: [TILE, columns]."""
    groups: tl.constexpr = SIDE.dim // SIDE.group
    return tl.reshape(
        tl.broadcast_to(x[:, :, None], [TILE, groups, SIDE.group]), [TILE, SIDE.columns]
    )
