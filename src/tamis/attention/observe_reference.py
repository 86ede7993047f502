"""Statistics of attention in plain torch, tile by tile, on any device.

What `tamis.attention.observe` says of its arguments holds here; `width` is the longest head's
length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tamis.attention.reference import QUERY_TILE, cached, gather, masked_scores, tiles, weigh
from tamis.cache.format import PagedKV


def chunk_scores(
    q: torch.Tensor,
    kv: PagedKV,
    width: int,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The scores of queries q [w, q_heads, k_dim] over the one row of `kv`.

    Returns:
        [q_heads, w, width], fp32; -inf where a query does not see a token.
    """
    grouped = _grouped(q, kv).permute(1, 2, 0, 3)  # [kv_heads, group, w, k_dim]
    out = grouped.new_full((*grouped.shape[:3], width), -torch.inf)
    for tokens, k, visible in _key_tiles(kv, positions, window):
        seen = visible.transpose(0, 1)[:, None]
        out[..., tokens] = masked_scores(grouped, k[0, :, None], seen, scale, softcap)
    return out.flatten(0, 1)


def column_sums(
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor,
    width: int,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The sums of exp(score - lse) over queries q [tokens, q_heads, k_dim]: [q_heads, width]."""
    grouped = _grouped(q, kv).permute(1, 2, 0, 3)
    lse = lse.T.reshape(grouped.shape[:3]).float()  # [kv_heads, group, tokens]
    out = grouped.new_zeros(*grouped.shape[:2], width)
    for start in range(0, q.shape[0], QUERY_TILE):
        rows = slice(start, start + QUERY_TILE)
        for tokens, k, visible in _key_tiles(kv, positions[rows], window):
            seen = visible.transpose(0, 1)[:, None]
            scores = masked_scores(grouped[:, :, rows], k[0, :, None], seen, scale, softcap)
            out[..., tokens] += _weights(scores, lse[:, :, rows]).sum(2)
    return out.flatten(0, 1)


def decode_scores(q: torch.Tensor, kv: PagedKV, width: int, *, scale: float) -> torch.Tensor:
    """The scores of each row's query q [n, q_heads, k_dim] over all cached tokens of the row.

    Returns:
        [n, q_heads, width], fp32; -inf beyond each head's length.
    """
    grouped = _grouped(q, kv)
    out = grouped.new_full((*grouped.shape[:3], width), -torch.inf)
    for tokens, k, visible in _key_tiles(kv, None, None):
        out[..., tokens] = masked_scores(grouped, k, visible[:, :, None], scale, None)
    return out.flatten(1, 2)


def decode_weights(
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor,
    width: int,
    *,
    scale: float,
    positions: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """exp(score - lse) of each row's query q [n, q_heads, k_dim]: [n, q_heads, width]."""
    grouped = _grouped(q, kv)
    lse = lse.reshape(grouped.shape[:3]).float()
    out = grouped.new_zeros(*grouped.shape[:3], width)
    for tokens, k, visible in _key_tiles(kv, positions, window):
        scores = masked_scores(grouped, k, visible[:, :, None], scale, softcap)
        out[..., tokens] = _weights(scores, lse)
    return out.flatten(1, 2)


def _grouped(q: torch.Tensor, kv: PagedKV) -> torch.Tensor:
    """Queries [n, q_heads, k_dim] by the KV head they read: [n, kv_heads, group, k_dim], fp32."""
    kv_heads = kv.lengths.shape[1]
    return q.float().reshape(q.shape[0], kv_heads, q.shape[1] // kv_heads, q.shape[2])


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse), written over `scores`; zero for a query that sees nothing, lse -inf."""
    return weigh(scores, lse).masked_fill_(lse[..., None] == -torch.inf, 0)


def _key_tiles(
    kv: PagedKV, positions: torch.Tensor | None, window: int | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The cached tokens tile by tile, but for tiles that no query sees.

    Args:
        kv: pages of n rows; or of one row, which all n queries read.
        positions: of the queries, [n]; None where every query sees every token.
        window: see `tamis.attention.observe`; needs `positions`.

    Yields:
        `(tokens, k, visible)`: the range of the tokens, their keys [rows, kv_heads, tokens, k_dim]
        in fp32, and whether query `i` sees them, bool [n, kv_heads, tokens].
    """
    for start, stop in tiles(kv):
        visible = cached(kv, start, stop)
        if positions is not None:
            at, query = gather(kv, "position", start, stop)[..., 0], positions[:, None, None]
            visible = visible & (at <= query)
            if window is not None:
                visible &= at > query - window
        if visible.any():
            yield slice(start, stop), gather(kv, "k", start, stop).float(), visible
