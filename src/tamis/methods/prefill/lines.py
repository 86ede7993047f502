"""Where attention lies in a chunk's map of weights: columns, diagonals and blocks, per query head.

Keys are numbered as in `ChunkView`, and the *offset* of a pair is its query's own key index minus
its key: a diagonal ("slash") is all pairs of one offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.methods.views import ChunkView


@dataclass(frozen=True)
class Grid:
    """A chunk's map cut into blocks.

    Attributes:
        block: tokens per block, of queries and of keys.
        keys: keys of each query head, int64 [q_heads].
        first, last: key indices of each query block's first and last query, int64
            [q_heads, q_blocks, 1].
        start: first key of each key block, int64 [key_blocks].
    """

    block: int
    keys: Tensor
    first: Tensor
    last: Tensor
    start: Tensor

    @classmethod
    def of(cls, view: ChunkView, block: int) -> Grid:
        tokens, q_heads, _ = view.q.shape
        past = view.lengths.repeat_interleave(q_heads // len(view.lengths))
        keys = past + tokens
        device = keys.device
        first = past[:, None, None] + torch.arange(0, tokens, block, device=device)[:, None]
        last = torch.minimum(first + block, keys[:, None, None]) - 1
        return cls(block, keys, first, last, torch.arange(0, int(keys.max()), block, device=device))

    @property
    def visible(self) -> Tensor:
        """The key blocks of which each query block sees anything, bool
        [q_heads, q_blocks, key_blocks]."""
        return self.start <= self.last

    @property
    def diagonal(self) -> Tensor:
        """The key blocks that hold the query blocks' own tokens, bool like `visible`."""
        return self.visible & (self.start + self.block > self.first)

    def crossed(self, offsets: Tensor) -> Tensor:
        """The key blocks through which diagonals go, bool like `visible`.

        Args:
            offsets: which diagonals, bool [q_heads, keys].
        """
        count = torch.nn.functional.pad(offsets.cumsum(1), (1, 0))  # offsets below each
        n = offsets.shape[1]
        nearest = (self.first - self.start - self.block + 1).clamp(0, n)
        furthest = (self.last - self.start + 1).clamp(0, n)
        through = count.gather(1, furthest.flatten(1)) > count.gather(1, nearest.flatten(1))
        return through.view_as(furthest)


def line_sums(weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of attention weights along columns and along diagonals.

    Args:
        weights: of a chunk's last m queries, causal, [q_heads, m, n].
        keys: keys of each query head, the last of them the last query's own, int64 [q_heads].

    Returns:
        Columns, by key, and diagonals, by offset, [q_heads, n] each.
    """
    q_heads, m, n = weights.shape
    # Row i of the padded map, read from its column c + i on: diagonals become columns, numbered by
    # the key that the last query sees.
    padded = torch.nn.functional.pad(weights, (m - 1, 0))
    width = n + m - 1
    by_last_key = padded.as_strided((q_heads, n, m), (m * width, 1, width + 1)).sum(2)
    last_key = keys[:, None] - 1 - torch.arange(n, device=weights.device)
    slashes = by_last_key.gather(1, last_key.clamp_min(0)).masked_fill(last_key < 0, 0)
    return weights.sum(1), slashes
