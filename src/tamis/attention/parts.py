"""Attention over keys and values that lie in tensors: decoded pages, draft trees, summaries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tamis.attention.merge import merge_states


@dataclass(frozen=True)
class KVPart:
    """Some keys and values of one sequence at one layer.

    Attributes:
        k: [kv_heads, n, k_dim]; v: [kv_heads, n, v_dim]; any floating dtype, finite everywhere.
        visible: which of them each query sees, bool, broadcastable to [kv_heads, tokens, n]; None
            for all.
        log_count: logarithm of how many tokens each stands for, fp32 [kv_heads, n]; None for one.
    """

    k: torch.Tensor
    v: torch.Tensor
    visible: torch.Tensor | None = None
    log_count: torch.Tensor | None = None


def attend_parts(
    q: torch.Tensor, parts: Iterable[KVPart], v_dim: int, *, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some queries over the union of some parts, one part after another.

    Args:
        q: [tokens, q_heads, k_dim]; query head `h` reads KV head `h // (q_heads // kv_heads)`.
        parts: disjoint sets of tokens; only one is in memory at a time.
        v_dim: elements of a value.
        scale: factor of the products of queries and keys.
        softcap: bound of the scores; None for no bound. Counts are added after it.

    Returns:
        `(out, lse)`: out [tokens, q_heads, v_dim], fp32; lse [tokens, q_heads], fp32. A query that
        sees nothing has out zero and lse -inf.

    Example:
        >>> import torch
        >>> from tamis.attention.parts import KVPart, attend_parts
        >>> part = KVPart(torch.zeros(1, 2, 8), torch.ones(1, 2, 4), log_count=torch.zeros(1, 2))
        >>> out, lse = attend_parts(torch.randn(3, 2, 8), [part], 4, scale=1.0, softcap=None)
        >>> out.shape, lse.exp().unique().round().tolist()
        (torch.Size([3, 2, 4]), [2.0])
    """
    tokens, q_heads, k_dim = q.shape
    out = q.new_zeros(tokens, q_heads, v_dim, dtype=torch.float32)
    lse = q.new_full((tokens, q_heads), -torch.inf, dtype=torch.float32)
    for part in parts:
        kv_heads = part.k.shape[0]
        grouped = q.float().reshape(tokens, kv_heads, -1, k_dim).permute(1, 2, 0, 3)
        scores = (grouped @ part.k.float().transpose(1, 2)[:, None]).mul_(scale)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if part.log_count is not None:
            scores += part.log_count[:, None, None]
        if part.visible is not None:
            scores.masked_fill_(~part.visible.expand(kv_heads, tokens, -1)[:, None], -torch.inf)
        part_lse = scores.logsumexp(-1)
        floor = torch.finfo(part_lse.dtype).min  # where nothing is seen, -inf less -inf is NaN
        weights = scores.sub_(part_lse.clamp_min(floor)[..., None]).exp_()
        part_out = weights @ part.v.float()[:, None]
        out, lse = merge_states(
            out,
            lse,
            part_out.permute(2, 0, 1, 3).reshape(out.shape),
            part_lse.permute(2, 0, 1).reshape(lse.shape),
        )
    return out, lse
