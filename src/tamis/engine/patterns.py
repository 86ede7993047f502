"""Prefill patterns of streaming heads, beside whatever pattern the other heads have."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tamis.attention.pattern import SparsePattern


def streaming_pattern(
    pattern: SparsePattern | None,
    streaming: Tensor,
    q_shape: torch.Size,
    lengths: Tensor,
    span: tuple[int, int],
) -> SparsePattern | None:
    """`pattern` with streaming heads that see first and recent tokens only.

    Args:
        pattern: of the other heads; None where they see everything.
        streaming: which KV heads stream, bool [kv_heads].
        q_shape: [tokens, q_heads, k_dim] of the chunk.
        lengths: keys before the chunk, per KV head, [kv_heads].
        span: first and recent tokens that streaming heads see.
    """
    if not bool(streaming.any()):
        return pattern
    tokens, q_heads = q_shape[:2]
    device = lengths.device
    streams = streaming.to(device).repeat_interleave(q_heads // len(streaming))
    sinks, recent = span
    if pattern is None:
        nothing = torch.zeros(q_heads, -(-tokens // 64), 0, dtype=torch.bool, device=device)
        others = SparsePattern.from_blocks(nothing, full=~streams)
    else:
        others = pattern
    block_counts = others.block_starts.diff(dim=1).masked_fill(streams[:, None], 0)
    owner = torch.repeat_interleave(
        torch.arange(q_heads, device=device),
        (others.block_starts[:, -1] - others.block_starts[:, 0]).long(),
    )
    ends = block_counts.flatten().cumsum(0).view_as(block_counts)
    starts = torch.cat([(ends - block_counts)[:, :1], ends], dim=1).int()
    cuts = others.column_starts.tolist()
    column_lists = [others.columns[start:end] for start, end in pairwise(cuts)]
    first = torch.arange(sinks, device=device, dtype=torch.int32)
    group = q_heads // len(streaming)
    columns = [
        first[: int(lengths[head // group]) + tokens] if streams[head] else column_lists[head]
        for head in range(q_heads)
    ]
    counts = torch.tensor([0, *map(len, columns)], device=device).cumsum(0).int()
    window = others.window if others.window is not None else torch.zeros_like(counts[1:])
    full = others.full if others.full is not None else torch.zeros_like(streams)
    return SparsePattern(
        others.block,
        starts,
        others.blocks[~streams[owner]],
        counts,
        torch.cat(columns),
        torch.where(streams, recent, window).int(),
        full & ~streams,
    )
