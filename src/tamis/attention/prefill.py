"""Attention of one sequence's new chunk of tokens over its cached pages and itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from tamis.attention.checks import check_options, check_paged
from tamis.attention.merge import merge_sinks, merge_states
from tamis.attention.reference import attend, cached, gather, gather_kv, tiles
from tamis.cache.format import PagedKV

QUERY_TILE = 512
"""Query tokens that attend at once: bounds the scores in memory, with the tiles of keys."""

KEY_TILE = 1024
"""Tokens of the chunk that are attended to at once."""

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values [kv_heads, 1, tokens, dim], and which a query sees, as `attend` takes them."""


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
    """Causal attention of a chunk of one sequence over what preceded it and over itself.

    out = softmax(softcap tanh(scale q K^T / softcap)) V over the visible tokens, where query head
    `h` reads KV head `h // (q_heads // kv_heads)`; without `softcap` the scores are scale q K^T.
    Softmax is in fp32, and memory is bounded by tiles of queries and keys.

    Args:
        q: the chunk's queries, [tokens, q_heads, k_dim], fp32, fp16 or bf16.
        k: the chunk's keys, [tokens, kv_heads, k_dim], q's dtype.
        v: the chunk's values, [tokens, kv_heads, v_dim], q's dtype.
        past: one row of pages with what precedes the chunk, per head as long as it may be; None
            for nothing. All of it is visible but for the window.
        scale: factor of the products of queries and keys.
        positions: absolute positions of the chunk's tokens, ascending, int32 or int64 [tokens].
        window: a query at position `p` sees positions p - window + 1 and later; None for all.
        softcap: bound of the scores; None for no bound.
        sinks: one logit per query head that joins the softmax's denominator only, [q_heads].

    Returns:
        `(out, lse)`: out [tokens, q_heads, v_dim] in q's dtype; lse [tokens, q_heads], fp32, the
        natural logarithm of the softmax's denominator, sinks included.

    Raises:
        ValueError: shapes or dtypes do not fit together.

    Example:
        >>> import torch
        >>> from tamis.attention import prefill
        >>> q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        >>> out, lse = prefill(q, k, v, None, scale=8**-0.5, positions=torch.arange(3))
        >>> torch.allclose(out[0, :2], v[0, :1])  # the first token sees only itself
        True
    """
    _check(q, k, v, past)
    check_options(q, positions, window, softcap, sinks)
    tokens, q_heads, _ = q.shape
    out = q.new_empty(tokens, q_heads, v.shape[2])
    lse = q.new_empty(tokens, q_heads, dtype=torch.float32)
    for start in range(0, tokens, QUERY_TILE):
        rows = slice(start, min(start + QUERY_TILE, tokens))
        out[rows], lse[rows] = _tile(q, k, v, past, rows, scale, positions, window, softcap)
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks)
    return out, lse


def _tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: PagedKV | None,
    rows: slice,
    scale: float,
    positions: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse, both fp32, of the chunk's queries `rows`."""
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
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


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


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: PagedKV | None) -> None:
    """Raise ValueError unless the chunk's tensors fit together and fit `past`."""
    if (
        q.dim() != 3
        or k.shape != (q.shape[0], k.shape[1], q.shape[2])
        or v.shape[:2] != k.shape[:2]
        or q.shape[1] % k.shape[1]
        or not q.dtype == k.dtype == v.dtype
    ):
        raise ValueError(
            "prefill needs q [tokens, q_heads, k_dim], k [tokens, kv_heads, k_dim] and "
            "v [tokens, kv_heads, v_dim] of one dtype, q_heads a multiple of kv_heads; got "
            f"q {q.dtype} {list(q.shape)}, k {k.dtype} {list(k.shape)}, v {v.dtype} {list(v.shape)}"
        )
    if past is not None:
        check_paged(q, past)
        if past.lengths.shape != (1, k.shape[1]) or past.format.field("v").width != v.shape[2]:
            raise ValueError(
                f"past must be one row of {k.shape[1]} KV heads with values of {v.shape[2]}, got "
                f"{list(past.lengths.shape)} and {past.format.field('v').width}"
            )
