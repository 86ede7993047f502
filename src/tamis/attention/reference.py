"""Attention in plain torch, on any device: what the other backends are checked against.

Tokens are read in tiles and the tiles' attentions merged by log-sum-exp, so memory is bounded by
the tile whatever the context length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from tamis.attention.merge import merge_sinks, merge_states
from tamis.cache.format import PagedKV

TILE = 4096
"""Cached tokens of each head that are gathered from pages at once."""

QUERY_TILE = 512
"""Query tokens of a chunk that attend at once."""

KEY_TILE = 1024
"""Tokens of a chunk that are attended to at once."""

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values [kv_heads, 1, tokens, dim], and which a query sees, as `attend` takes them."""


def decode(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tamis.attention.decode`, whose docstring holds."""
    n, q_heads, k_dim = q.shape
    kv_heads = kv.lengths.shape[1]
    v_dim = kv.format.field("v").width
    grouped = q.float().reshape(n, kv_heads, q_heads // kv_heads, k_dim)
    out = grouped.new_zeros(n, kv_heads, q_heads // kv_heads, v_dim)
    lse = grouped.new_full(out.shape[:-1], -torch.inf)
    for start, stop in tiles(kv):
        visible = cached(kv, start, stop)
        if window is not None and positions is not None:
            oldest = positions - window + 1
            visible &= gather(kv, "position", start, stop)[..., 0] >= oldest[:, None, None]
        if not visible.any():
            continue
        k, v = gather_kv(kv, start, stop)
        part = attend(grouped, k.float(), v.float(), visible[:, :, None], scale, softcap)
        out, lse = merge_states(out, lse, *part)
    out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: PagedKV | None,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tamis.attention.prefill`, whose docstring holds."""
    tokens, q_heads, _ = q.shape
    out = q.new_empty(tokens, q_heads, v.shape[2])
    lse = q.new_empty(tokens, q_heads, dtype=torch.float32)
    for start in range(0, tokens, QUERY_TILE):
        rows = slice(start, min(start + QUERY_TILE, tokens))
        out[rows], lse[rows] = _prefill_tile(
            q, k, v, past, rows, scale, positions, window, softcap, sinks
        )
    return out, lse


def _prefill_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: PagedKV | None,
    rows: slice,
    scale: float,
    positions: torch.Tensor,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [queries, q_heads, v_dim] and lse, both fp32, of the chunk's queries `rows`."""
    kv_heads, q_heads = k.shape[1], q.shape[1]
    grouped = q[rows].float().view(-1, kv_heads, q_heads // kv_heads, q.shape[2])
    grouped = grouped.permute(1, 2, 0, 3)  # [kv_heads, group, queries, k_dim]
    at = positions[rows, None]
    oldest = at - window + 1 if window is not None else None
    out = grouped.new_zeros(*grouped.shape[:-1], v.shape[2])
    lse = grouped.new_full(grouped.shape[:-1], -torch.inf)
    parts = _past_parts(past, oldest) if past is not None else iter(())
    for keys, values, visible in chain(parts, _own_parts(k, v, positions, at, oldest)):
        part = attend(grouped, keys.float(), values.float(), visible, scale, softcap)
        out, lse = merge_states(out, lse, *part)
    out, lse = out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)
    return (out, lse) if sinks is None else merge_sinks(out, lse, sinks)


def _past_parts(past: PagedKV, oldest: torch.Tensor | None) -> Iterator[Part]:
    """The cached tokens tile by tile, but for tiles that no query sees."""
    for start, stop in tiles(past):
        visible = cached(past, start, stop)[0, :, None, None]
        if oldest is not None:
            at = gather(past, "position", start, stop)[0, :, None, None, :, 0]
            visible = visible & (at >= oldest)
            if not visible.any():
                continue
        keys, values = gather_kv(past, start, stop)
        yield keys[0, :, None], values[0, :, None], visible


def _own_parts(
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    at: torch.Tensor,
    oldest: torch.Tensor | None,
) -> Iterator[Part]:
    """The chunk's own tokens tile by tile, but for tiles that no query sees."""
    for start in range(0, len(positions), KEY_TILE):
        own = slice(start, start + KEY_TILE)
        visible = positions[own] <= at
        if oldest is not None:
            visible &= positions[own] >= oldest
        if visible.any():
            yield k[own].transpose(0, 1)[:, None], v[own].transpose(0, 1)[:, None], visible


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(softcap tanh(scale q k^T / softcap)) v over the visible tokens.

    Args:
        q: [..., queries, k_dim], fp32.
        k: [..., tokens, k_dim], fp32.
        v: [..., tokens, v_dim], fp32; finite everywhere.
        visible: bool, broadcastable to [..., queries, tokens]; None sees every token.
        scale: factor of the products.
        softcap: bound of the scores, or None.

    Returns:
        `(out, lse)`: [..., queries, v_dim] and [..., queries], fp32; zero and -inf for a query
        that sees nothing.
    """
    scores = masked_scores(q, k, visible, scale, softcap)
    lse = scores.logsumexp(-1)
    return weigh(scores, lse) @ v, lse


def masked_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softcap tanh(scale q k^T / softcap), [..., queries, tokens], fp32; -inf where not visible.

    The arguments are those of `attend`.
    """
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    return scores


def weigh(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse), written over `scores` [..., tokens] with `lse` [...]."""
    # A query that sees nothing has lse -inf, where the difference would be NaN.
    return scores.sub_(lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp_()


def tiles(kv: PagedKV) -> list[tuple[int, int]]:
    """The token ranges that cover the longest head of `kv`, TILE tokens at a time."""
    longest = int(kv.lengths.max()) if kv.lengths.numel() else 0
    return [(start, min(start + TILE, longest)) for start in range(0, longest, TILE)]


def cached(kv: PagedKV, start: int, stop: int) -> torch.Tensor:
    """Which of the tokens start..stop exist: bool [n, kv_heads, stop - start]."""
    token = torch.arange(start, stop, device=kv.lengths.device)
    return token < kv.lengths[..., None]


def gather_kv(kv: PagedKV, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the tokens start..stop, [n, kv_heads, stop - start, k_dim or v_dim].

    Tokens that do not exist are zero, whatever the memory behind them holds.
    """
    missing = ~cached(kv, start, stop)[..., None]
    k, v = (gather(kv, name, start, stop).masked_fill_(missing, 0) for name in ("k", "v"))
    return k, v


def gather(kv: PagedKV, name: str, start: int, stop: int) -> torch.Tensor:
    """One field of the tokens start..stop of every head, copied out of the pages.

    Returns:
        [n, kv_heads, stop - start, width] of the field's dtype; arbitrary where a head has no
        such token.
    """
    size = kv.format.page_size
    first, last = start // size, -(-stop // size)
    pages = kv.tables[..., first:last]
    exists = torch.arange(first, last, device=pages.device) * size < kv.lengths[..., None]
    rows = kv.format.view(kv.data, name)[torch.where(exists, pages, 0).long()].flatten(2, 3)
    return rows[:, :, start - first * size : stop - first * size]
