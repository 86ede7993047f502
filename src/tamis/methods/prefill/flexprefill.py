"""FlexPrefill: every head computes as much as its own attention asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.attention.pattern import SparsePattern
from tamis.methods.base import Prefill, param
from tamis.methods.prefill.lines import Grid, line_sums
from tamis.methods.views import ChunkView, top_mask


@dataclass(frozen=True)
class FlexPrefill(Prefill):
    """Per head and chunk: a pattern by how well blocks can be estimated, and as many of them as
    hold a share gamma of the attention.

    Let a be the softmax of the mean of the last `block` queries over the mean keys of all blocks,
    and b their true attention, averaged over those queries and summed per block. Where the
    Jensen-Shannon distance

        D(a, b) = sqrt((KL(a || m) + KL(b || m)) / 2),  m = (a + b) / 2

    is below tau the head is *query-aware*: the fewest blocks of the whole map whose estimated
    weights, softmax of mean queries and mean keys, make up gamma of all (algorithm 4). Any other
    head is *vertical-slash*: of the true attention of the last queries, the columns and diagonals
    that make up gamma of it (algorithm 3). (FlexPrefill, algorithms 1 to 4.)

    As in the reference code: lines are counted token by token and computed in whole blocks, those
    of largest sums; at least `min_budget` tokens' worth of blocks, both of columns and diagonals,
    in every head; and prompts within `min_budget` or two blocks are computed whole. The first block
    and each query block's own are computed too; the reference counts them among the others, which
    loses a single needle where one block would have been enough.

    Departures: a chunk of the prompt decides by its own last queries. Its blocks need not lie on
    the grid of the keys; a diagonal of blocks is then the key blocks that its nearest diagonal
    crosses, and a query block weighs every key block of which it sees anything. Layers with a
    sliding window are left alone.
    """

    paper: ClassVar[str] = (
        "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence "
        "Inference (arXiv:2502.20766)"
    )
    gamma: float = param(0.9, "share of the attention to compute", above=0.0, maximum=1.0)
    tau: float = param(0.1, "distance below which a head is query-aware", minimum=0.0)
    min_budget: int = param(1024, "keys that are computed at least", minimum=0)
    block: int = param(128, "tokens per block", minimum=1)

    def pattern(self, view: ChunkView) -> SparsePattern | None:
        grid = Grid.of(view, self.block)
        longest = int(grid.keys.max())
        windowed = view.shape.layers[view.layer].window is not None
        if windowed or longest <= max(2 * self.block, self.min_budget):
            return None
        weights = view.window(self.block)
        columns, diagonals = (sums / weights.shape[1] for sums in line_sums(weights, grid.keys))
        by_block = _pooled(columns, self.block)
        keys = view.pooled_keys(self.block)
        keys = keys.repeat_interleave(len(by_block) // len(keys), 0)
        estimate = self._estimate(view, grid, keys)
        query_aware = distance(estimate, by_block) < self.tau

        mask = self._lines(grid, query_aware, columns, diagonals, by_block)
        if query_aware.any():
            heads = query_aware.nonzero()[:, 0]
            queries = view.pooled_queries(self.block)[heads]
            products = queries @ keys[heads].transpose(1, 2) * view.scale
            visible = grid.visible[heads]
            rows = products.masked_fill(~visible, -torch.inf).softmax(2)
            chosen = cover(rows.flatten(1) / rows.shape[1], self.gamma).view_as(rows)
            mask[heads] |= chosen & visible
        return SparsePattern.from_blocks(mask, block=self.block)

    def _estimate(self, view: ChunkView, grid: Grid, keys: Tensor) -> Tensor:
        """Softmax of the last queries' mean over the mean keys, [q_heads, key_blocks]."""
        query = view.q[-self.block :].float().mean(0)
        products = (keys @ query[:, :, None])[:, :, 0] * view.scale
        return products.masked_fill(grid.start >= grid.keys[:, None], -torch.inf).softmax(1)

    def _lines(
        self, grid: Grid, query_aware: Tensor, columns: Tensor, diagonals: Tensor, by_block: Tensor
    ) -> Tensor:
        """Blocks of the columns and diagonals that each head computes, bool
        [q_heads, q_blocks, key_blocks]: query-aware heads the least number."""
        least = -(-self.min_budget // self.block)
        slash_sums = _pooled(diagonals, self.block)
        chosen = []
        for lines, blocks in ((columns, by_block), (diagonals, slash_sums)):
            needed = cover(lines, self.gamma).sum(1).masked_fill(query_aware, 0)
            count = (-(-needed // self.block)).clamp_min(max(1, least))
            best = top_mask(blocks, count)
            best[:, 0] = True
            chosen.append(best)
        offsets = torch.zeros_like(diagonals, dtype=torch.bool)
        offsets[:, :: self.block] = chosen[1]
        return (chosen[0][:, None] & grid.visible) | grid.crossed(offsets)


def distance(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon distance of distributions [..., n] (square root, natural logarithm)."""
    mean = (p + q) / 2
    # xlogy is 0 where a weight is 0, and then so is the other logarithm's factor.
    to_mean = [(torch.xlogy(one, one) - torch.xlogy(one, mean)).sum(-1) for one in (p, q)]
    return ((to_mean[0] + to_mean[1]) / 2).clamp_min(0).sqrt()


def cover(weights: Tensor, share: float) -> Tensor:
    """The fewest elements of each row that make up `share` of 1, bool like `weights` [rows, n]; of
    equal ones the earlier."""
    ordered, index = weights.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(weights, dtype=torch.bool).scatter(1, index, before < share)


def _pooled(lines: Tensor, block: int) -> Tensor:
    """Sums over blocks of `block` lines: [q_heads, n] to [q_heads, blocks]."""
    return torch.stack([part.sum(1) for part in torch.split(lines, block, 1)], 1)
