"""Which pairs a sparse attention computes: `SparsePattern` for prefill, `TokenList` for decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparsePattern:
    """Which (query, key) pairs the prefill of one chunk computes, per query head.

    The keys of a query head are those of its KV head, numbered 0..length-1 (cached tokens, in
    cached order) and length..length+tokens-1 (the chunk's own); query `i` of the chunk is key
    `length + i`. A query sees the union of what the fields name, never a key after itself.

    Attributes:
        block: tokens per block. Query block `b` is tokens [b block, (b + 1) block) of the chunk,
            key block `j` is key indices [j block, (j + 1) block).
        block_starts: offsets in `blocks`, int32 [q_heads, q_blocks + 1], head after head.
        blocks: key blocks, int32 [nnz]; query block `b` of head `h` sees, strictly ascending,
            blocks[block_starts[h, b] : block_starts[h, b + 1]].
        column_starts: offsets in `columns`, int32 [q_heads + 1].
        columns: key indices that every query of head `h` sees, int32 [m], strictly ascending:
            columns[column_starts[h] : column_starts[h + 1]].
        window: the query that is key `p` sees keys p - window[h] + 1 .. p, int32 [q_heads]; 0 or
            None adds none.
        full: heads that see everything, bool [q_heads]; None for none.

    Raises:
        ValueError: the fields do not fit together.
    """

    block: int
    block_starts: torch.Tensor
    blocks: torch.Tensor
    column_starts: torch.Tensor
    columns: torch.Tensor
    window: torch.Tensor | None = None
    full: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")
        if self.block_starts.dim() != 2 or self.block_starts.shape[1] < 1:
            raise ValueError(
                f"block_starts must be [q_heads, q_blocks + 1], got {list(self.block_starts.shape)}"
            )
        heads = self.q_heads
        for name, value, shape, dtype in (
            ("block_starts", self.block_starts, self.block_starts.shape, torch.int32),
            ("blocks", self.blocks, (self.blocks.numel(),), torch.int32),
            ("column_starts", self.column_starts, (heads + 1,), torch.int32),
            ("columns", self.columns, (self.columns.numel(),), torch.int32),
            ("window", self.window, (heads,), torch.int32),
            ("full", self.full, (heads,), torch.bool),
        ):
            if value is not None and (value.dtype != dtype or value.shape != shape):
                raise ValueError(
                    f"{name} must be {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
                )
        if not torch.equal(self.block_starts[1:, 0], self.block_starts[:-1, -1]):
            raise ValueError("block_starts must go on from one head to the next without a gap")
        flat = torch.cat([self.block_starts[:, :-1].flatten(), self.block_starts[-1:, -1]])
        _check_lists("blocks", self.blocks, flat)
        _check_lists("columns", self.columns, self.column_starts)
        if self.window is not None and (self.window < 0).any():
            raise ValueError(f"window must not be negative, got {int(self.window.min())}")

    @property
    def q_heads(self) -> int:
        """Query heads."""
        return self.block_starts.shape[0]

    @property
    def q_blocks(self) -> int:
        """Query blocks of the chunk."""
        return self.block_starts.shape[1] - 1

    @classmethod
    def from_blocks(
        cls,
        mask: torch.Tensor,
        columns: Sequence[torch.Tensor] | None = None,
        *,
        block: int = 64,
        window: torch.Tensor | None = None,
        full: torch.Tensor | None = None,
    ) -> SparsePattern:
        """The pattern of a mask of blocks, and columns.

        Args:
            mask: which key blocks each query block sees, bool [q_heads, q_blocks, key_blocks].
            columns: per query head the key indices that all of its queries see, any integer
                dtype, in any order; None for none.
            block: tokens per block.
            window: as in the class.
            full: as in the class.

        Raises:
            ValueError: the arguments do not fit together.
        """
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise ValueError(
                "mask must be torch.bool [q_heads, q_blocks, key_blocks], "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        heads, q_blocks = mask.shape[:2]
        if columns is None:
            columns = [mask.new_zeros(0, dtype=torch.int32)] * heads
        if len(columns) != heads:
            raise ValueError(f"columns must be one tensor for each of {heads} heads")
        ends = mask.sum(-1).flatten().cumsum(0).view(heads, q_blocks)
        starts = ends.new_zeros(heads, q_blocks + 1)
        starts[:, 1:] = ends
        if q_blocks:
            starts[1:, 0] = ends[:-1, -1]
        lists = [torch.unique(one).int() for one in columns]
        return cls(
            block,
            starts.int(),
            mask.nonzero()[:, 2].int(),
            _offsets(lists).to(mask.device),
            torch.cat(lists),
            window,
            full,
        )

    @classmethod
    def a_shape(
        cls,
        q_heads: int,
        tokens: int,
        lengths: torch.Tensor,
        sinks: int,
        window: int,
        *,
        block: int = 64,
    ) -> SparsePattern:
        """Each query sees the first `sinks` keys and the last `window` keys, itself included.

        Args:
            q_heads: query heads.
            tokens: tokens of the chunk.
            lengths: cached tokens of each KV head, integers [kv_heads].
            sinks: keys at the front.
            window: keys at the end.
            block: tokens per query block.
        """
        mask = torch.zeros(q_heads, -(-tokens // block), 0, dtype=torch.bool, device=lengths.device)
        first = torch.arange(sinks, device=lengths.device)
        per_kv_head = [first[: int(length) + tokens] for length in lengths]
        group = q_heads // len(per_kv_head)
        columns = [per_kv_head[head // group] for head in range(q_heads)]
        windows = torch.full((q_heads,), window, dtype=torch.int32, device=lengths.device)
        return cls.from_blocks(mask, columns, block=block, window=windows)

    def visible(
        self, head: int, queries: torch.Tensor, keys: torch.Tensor, length: int
    ) -> torch.Tensor:
        """Whether queries of one query head see keys, but for causality.

        Args:
            head: the query head.
            queries: tokens of the chunk, ascending, int64 [queries].
            keys: key indices, ascending, int64 [keys].
            length: cached tokens of the KV head.

        Returns:
            bool [queries, keys].
        """
        if self.full is not None and self.full[head]:
            return torch.ones(len(queries), len(keys), dtype=torch.bool, device=keys.device)
        q_block, key_block = queries // self.block, keys // self.block
        first, last = int(q_block[0]), int(q_block[-1])
        starts = self.block_starts[head, first : last + 2].long()
        listed = self.blocks[starts[0] : starts[-1]].long()
        row = torch.repeat_interleave(torch.arange(last + 1 - first), starts.diff().cpu())
        widest = max(int(listed.max()) if len(listed) else 0, int(key_block[-1]))
        table = torch.zeros(last + 1 - first, widest + 1, dtype=torch.bool, device=keys.device)
        table[row.to(keys.device), listed] = True
        seen = table[q_block - first][:, key_block]
        seen |= torch.isin(
            keys, self.columns[self.column_starts[head] : self.column_starts[head + 1]]
        )
        if self.window is not None:
            seen |= keys > (queries + length - self.window[head])[:, None]
        return seen

    def density(self, lengths: torch.Tensor, tokens: int | None = None) -> float:
        """The share of the causal (query, key) pairs that is computed, counted exactly.

        Args:
            lengths: cached tokens of each KV head, integers [kv_heads].
            tokens: tokens of the chunk; None where they fill their last block.
        """
        tokens = self.q_blocks * self.block if tokens is None else tokens
        computed = causal = 0
        per_head = lengths.repeat_interleave(self.q_heads // len(lengths)).tolist()
        for head, length in enumerate(per_head):
            pairs = tokens * length + tokens * (tokens + 1) // 2
            full = self.full is not None and bool(self.full[head])
            computed += pairs if full else self._pairs(head, length, tokens)
            causal += pairs
        return computed / causal if causal else 1.0

    def _pairs(self, head: int, length: int, tokens: int) -> int:
        """Pairs that a query head computes: its window's, then its blocks', then its columns'."""
        window = int(self.window[head]) if self.window is not None else 0
        at = torch.arange(length + 1, length + tokens + 1)
        in_window = int(at.clamp_max(window).sum())

        # What leaves the window: key c is older than the window of the query at key c + window.
        firsts = (torch.arange(self.q_blocks) * self.block + length).clamp_max(length + tokens)
        ends = (firsts + self.block).clamp_max(length + tokens)
        starts = self.block_starts[head].long().cpu()
        listed = self.blocks[starts[0] : starts[-1]].long().cpu()
        row = torch.repeat_interleave(torch.arange(self.q_blocks), starts.diff())
        oldest = listed * self.block + window
        in_blocks = _clamped_sum(ends[row] - oldest, self.block)
        in_blocks -= _clamped_sum(firsts[row] - oldest, self.block)

        bounds = self.column_starts[head : head + 2].tolist()
        columns = self.columns[bounds[0] : bounds[1]].long().cpu()
        column_block = columns // self.block
        widest = int(torch.cat([listed, column_block, torch.zeros(1).long()]).max())
        table = torch.zeros(self.q_blocks, widest + 1, dtype=torch.bool)
        table[row, listed] = True
        seen_by = ends[:, None] - torch.maximum(firsts[:, None], columns + window)
        in_columns = seen_by.clamp_min(0).masked_fill(table[:, column_block], 0)
        return in_window + int(in_blocks.sum()) + int(in_columns.sum())


@dataclass(frozen=True)
class TokenList:
    """Which cached tokens a decode step reads, per row and KV head.

    Attributes:
        indices: cached indices (not positions), strictly ascending, int32 [n, kv_heads, max];
            what lies past a head's count is not read.
        counts: tokens of each head, int32 [n, kv_heads].

    Raises:
        ValueError: the fields do not fit together.
    """

    indices: torch.Tensor
    counts: torch.Tensor

    def __post_init__(self) -> None:
        indices, counts = self.indices, self.counts
        if (
            indices.dtype != torch.int32
            or counts.dtype != torch.int32
            or indices.dim() != 3
            or counts.shape != indices.shape[:2]
        ):
            raise ValueError(
                "a token list needs torch.int32 indices [n, kv_heads, max] and counts "
                f"[n, kv_heads], got {indices.dtype} {list(indices.shape)} and "
                f"{counts.dtype} {list(counts.shape)}"
            )
        if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= indices.shape[2]:
            raise ValueError(
                f"counts must lie in 0..{indices.shape[2]}, "
                f"got {int(counts.min())}..{int(counts.max())}"
            )
        unread = torch.arange(1, indices.shape[2], device=counts.device) >= counts[..., None]
        if not ((indices[..., 1:] > indices[..., :-1]) | unread).all():
            raise ValueError("indices of a token list must ascend strictly within each head")


def _check_lists(name: str, values: torch.Tensor, starts: torch.Tensor) -> None:
    """Raise ValueError unless `starts` [lists + 1] cuts `values` into ascending lists."""
    if int(starts[0]) != 0 or int(starts[-1]) != len(values) or (starts.diff() < 0).any():
        raise ValueError(
            f"the offsets of {name} must ascend from 0 to {len(values)}, "
            f"got {int(starts[0])} to {int(starts[-1])}"
        )
    if not len(values):
        return
    opens = torch.zeros(len(values) + 1, dtype=torch.bool, device=values.device)
    opens[starts.long()] = True
    if int(values.min()) < 0 or not ((values.diff() > 0) | opens[1:-1]).all():
        raise ValueError(f"{name} must be at least 0 and ascend strictly within each list")


def _offsets(lists: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where each list starts when they are joined, and where the last one ends: int32."""
    return torch.tensor([0, *map(len, lists)]).cumsum(0).int()


def _clamped_sum(x: torch.Tensor, bound: int) -> torch.Tensor:
    """The sum of min(max(t, 0), bound) over integers t <= x, as if it were 0 for x <= 0."""
    inside = x.clamp(0, bound)
    return inside * (inside + 1) // 2 + (x - bound).clamp_min(0) * bound
