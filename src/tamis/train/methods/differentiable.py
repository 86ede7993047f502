"""Attention that gradients flow through, in blocks of queries that are computed again backwards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_BLOCK = 256  # queries that attend at once


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first_tokens: int = 0,
    recent_tokens: int | None = None,
) -> Tensor:
    """Causal attention of one sequence with itself, differentiable in q, k and v.

    Memory, also for the backward pass, is that of one block of queries and all its keys.

    Args:
        q: [tokens, q_heads, k_dim]; k: [tokens, kv_heads, k_dim]; v: [tokens, kv_heads, v_dim].
        scale, window, softcap, sinks: as in `tamis.attention.prefill`.
        first_tokens, recent_tokens: with `recent_tokens`, a query sees only the first and the
            recent tokens, itself among them, as in a streaming head.

    Returns:
        fp32 [tokens, q_heads, v_dim].
    """
    n = len(q)
    reach = n if recent_tokens is None else recent_tokens
    places = torch.arange(n, device=q.device)
    blocks = []
    for start in range(0, n, _BLOCK):
        rows = places[start : start + _BLOCK]
        oldest = max(0, start - reach + 1)
        read = torch.cat([places[: min(first_tokens, oldest)], places[oldest : rows[-1] + 1]])
        age = rows[:, None] - read
        visible = (age >= 0) & ((age < reach) | (read < first_tokens))
        if window is not None:
            visible &= age < window
        blocks.append(
            checkpoint(
                _attend, q[rows], k[read], v[read], visible, scale, softcap, sinks,
                use_reentrant=False,
            )
        )  # fmt: skip
    return torch.cat(blocks)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of some queries over some keys, `visible` bool [queries, keys] saying which."""
    grouped = q.float().reshape(len(q), k.shape[1], -1, q.shape[2])
    scores = scale * torch.einsum("qhgd,khd->hgqk", grouped, k.float())
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        extra = sinks.float().view(k.shape[1], -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hgqk,khd->qhgd", weights, v.float()).flatten(1, 2)
