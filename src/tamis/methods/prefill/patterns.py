"""MInference's three patterns of heads: A-shape, vertical-slash and block-sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.attention.pattern import SparsePattern
from tamis.methods.prefill.lines import Grid, line_sums
from tamis.methods.views import ChunkView, top_mask

A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = range(3)
"""Kinds of patterns, as the fitted file numbers them."""

LEAST_VERTICALS, LEAST_SLASHES = 30, 50
FIRST_KEYS, LAST_OFFSETS = 30, 100
"""Of vertical-slash heads, as in the reference code: the least numbers of lines, and those always
among them (the first keys, the nearest diagonals)."""


def head_patterns(
    view: ChunkView, kind: Tensor, size: Tensor, *, block: int = 64, last_q: int = 64
) -> SparsePattern | None:
    """The pattern of a chunk whose heads have these kinds; None if it is all pairs.

    Args:
        view: the chunk.
        kind: int64 [q_heads].
        size: int64 [q_heads, 2]: sinks and window, verticals and slashes, or blocks and anything.
        block: tokens per block.
        last_q: last queries that estimate vertical-slash heads.
    """
    grid = Grid.of(view, block)
    whole = torch.where(kind == BLOCK_SPARSE, size[:, 0] * block, size.amax(1))
    whole = torch.where(kind == A_SHAPE, size.sum(1), whole)
    full = whole >= grid.keys
    if full.all():
        return None
    mask = torch.zeros_like(grid.visible)
    columns = torch.zeros(len(kind), int(grid.keys.max()), dtype=torch.bool, device=kind.device)
    window = torch.zeros(len(kind), dtype=torch.int32, device=kind.device)

    if (heads := (kind == A_SHAPE) & ~full).any():
        sinks, near = a_shape(grid, size)
        columns |= sinks & heads[:, None]
        window = torch.where(heads, near, window)
    if (heads := (kind == VERTICAL_SLASH) & ~full).any():
        blocks, verticals = vertical_slash(view, grid, size, last_q)
        mask |= blocks & heads[:, None, None]
        columns |= verticals & heads[:, None]
    if (heads := (kind == BLOCK_SPARSE) & ~full).any():
        mask |= block_sparse(view, grid, size[:, 0]) & heads[:, None, None]
    lists = [head.nonzero()[:, 0] for head in columns]
    return SparsePattern.from_blocks(mask, lists, block=block, window=window, full=full)


def a_shape(grid: Grid, size: Tensor) -> tuple[Tensor, Tensor]:
    """First keys as columns, bool [q_heads, keys], and sliding windows, int32 [q_heads]."""
    key = torch.arange(int(grid.keys.max()), device=size.device)
    return key < size[:, :1], size[:, 1].int()


def vertical_slash(view: ChunkView, grid: Grid, size: Tensor, last_q: int) -> tuple[Tensor, Tensor]:
    """Blocks that the best diagonals cross, bool [q_heads, q_blocks, key_blocks], and the best
    columns, bool [q_heads, keys]."""
    verticals, slashes = line_sums(view.window(last_q), grid.keys)
    verticals[:, :FIRST_KEYS] = torch.inf
    slashes[:, :LAST_OFFSETS] = torch.inf
    beyond = torch.arange(verticals.shape[1], device=size.device) >= grid.keys[:, None]
    count = size.clamp_min(torch.tensor([LEAST_VERTICALS, LEAST_SLASHES], device=size.device))
    columns = top_mask(verticals.masked_fill(beyond, -torch.inf), count[:, 0])
    offsets = top_mask(slashes.masked_fill(beyond, -torch.inf), count[:, 1])
    return grid.crossed(offsets), columns


def block_sparse(view: ChunkView, grid: Grid, count: Tensor) -> Tensor:
    """The `count` [q_heads] best key blocks of every query block, and its own: bool
    [q_heads, q_blocks, key_blocks]."""
    q, k = view.pooled_queries(grid.block), view.pooled_keys(grid.block)
    products = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)
    scores = products.masked_fill(~grid.visible, -torch.inf)
    rows = count.repeat_interleave(scores.shape[1])
    return top_mask(scores.flatten(0, 1), rows).view_as(scores) | grid.diagonal
