"""Attention in plain torch, on any device: what the other backends are checked against.

Tokens are read in tiles and the tiles' attentions merged by log-sum-exp, so memory is bounded by
the tile whatever the context length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch

from tamis.attention.merge import merge_sinks, merge_states
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.cache.format import PagedKV

TILE = 4096
"""Cached tokens of each head that are gathered from pages at once."""

QUERY_TILE = 512
"""Query tokens of a chunk that attend at once."""

KEY_TILE = 1024
"""Tokens of a chunk that are attended to at once."""

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]
"""Keys and values [kv_heads, 1, tokens, dim], and which a query sees, as `attend` takes them; and
per KV head the index of the first key, as in `SparsePattern`."""


def decode(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tokens: TokenList | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tamis.attention.decode`, whose docstring holds."""
    n, q_heads, k_dim = q.shape
    kv_heads = kv.lengths.shape[1]
    v_dim = kv.format.field("v").width
    grouped = q.float().reshape(n, kv_heads, q_heads // kv_heads, k_dim)
    out = grouped.new_zeros(n, kv_heads, q_heads // kv_heads, v_dim)
    lse = grouped.new_full(out.shape[:-1], -torch.inf)
    read = kv if tokens is None else replace(kv, lengths=tokens.counts)
    for start, stop in tiles(read):
        exists = visible = cached(read, start, stop)
        if window is not None and positions is not None:
            oldest = positions - window + 1
            at = _read(kv, tokens, "position", start, stop)[..., 0]
            visible = exists & (at >= oldest[:, None, None])
        if not visible.any():
            continue
        k, v = (
            _read(kv, tokens, name, start, stop).masked_fill_(~exists[..., None], 0)
            for name in ("k", "v")
        )
        part = attend(grouped, k.float(), v.float(), visible[:, :, None], scale, softcap)
        out, lse = merge_states(out, lse, *part)
    out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _read(kv: PagedKV, tokens: TokenList | None, name: str, start: int, stop: int) -> torch.Tensor:
    """One field of the tokens start..stop, or of the listed ones: like `gather`."""
    if tokens is None:
        return gather(kv, name, start, stop)
    unread = torch.arange(start, stop, device=kv.tables.device) >= tokens.counts[..., None]
    index = tokens.indices[..., start:stop].long().masked_fill(unread, 0)
    pages = kv.tables.gather(-1, index // kv.format.page_size).long().masked_fill(unread, 0)
    return kv.format.view(kv.data, name)[pages, index % kv.format.page_size]


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
    pattern: SparsePattern | None = None,
    own: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tamis.attention.prefill`, whose docstring holds."""
    tokens, q_heads, _ = q.shape
    out = q.new_empty(tokens, q_heads, v.shape[2])
    lse = q.new_empty(tokens, q_heads, dtype=torch.float32)
    for start in range(0, tokens, QUERY_TILE):
        rows = slice(start, min(start + QUERY_TILE, tokens))
        out[rows], lse[rows] = _prefill_tile(
            q, k, v, past, rows, scale, positions, window, softcap, sinks, pattern, own
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
    pattern: SparsePattern | None,
    own: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [queries, q_heads, v_dim] and lse, both fp32, of the chunk's queries `rows`."""
    kv_heads, q_heads = k.shape[1], q.shape[1]
    grouped = q[rows].float().view(-1, kv_heads, q_heads // kv_heads, q.shape[2])
    grouped = grouped.permute(1, 2, 0, 3)  # [kv_heads, group, queries, k_dim]
    at = positions[rows, None]
    oldest = at - window + 1 if window is not None else None
    out = grouped.new_zeros(*grouped.shape[:-1], v.shape[2])
    lse = grouped.new_full(grouped.shape[:-1], -torch.inf)
    lengths = past.lengths[0].tolist() if past is not None else [0] * kv_heads
    parts = chain(
        _past_parts(past, oldest) if past is not None else (),
        _own_parts(k, v, positions, at, oldest, lengths) if own else (),
    )
    for keys, values, visible, first_keys in parts:
        if pattern is not None:
            visible = visible & _listed(pattern, rows, first_keys, keys.shape[2], lengths)
        part = attend(grouped, keys.float(), values.float(), visible, scale, softcap)
        out, lse = merge_states(out, lse, *part)
    out, lse = out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)
    return (out, lse) if sinks is None else merge_sinks(out, lse, sinks)


def _listed(
    pattern: SparsePattern, rows: slice, first_keys: list[int], n_keys: int, lengths: list[int]
) -> torch.Tensor:
    """Which of the `n_keys` keys from `first_keys` the pattern names for the queries `rows`.

    Returns:
        bool [kv_heads, group, queries, n_keys].
    """
    group = pattern.q_heads // len(lengths)
    device = pattern.blocks.device
    queries = torch.arange(rows.start, rows.stop, device=device)
    heads = [
        pattern.visible(
            head,
            queries,
            torch.arange(n_keys, device=device) + first_keys[head // group],
            lengths[head // group],
        )
        for head in range(pattern.q_heads)
    ]
    return torch.stack(heads).view(len(lengths), group, len(queries), n_keys)


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
        yield keys[0, :, None], values[0, :, None], visible, [start] * keys.shape[1]


def _own_parts(
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    at: torch.Tensor,
    oldest: torch.Tensor | None,
    lengths: list[int],
) -> Iterator[Part]:
    """The chunk's own tokens tile by tile, but for tiles that no query sees."""
    for start in range(0, len(positions), KEY_TILE):
        own = slice(start, start + KEY_TILE)
        visible = positions[own] <= at
        if oldest is not None:
            visible &= positions[own] >= oldest
        if visible.any():
            keys, values = (x[own].transpose(0, 1)[:, None] for x in (k, v))
            yield keys, values, visible, [length + start for length in lengths]


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
