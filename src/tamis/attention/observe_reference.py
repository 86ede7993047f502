"""Statistics of attention in plain torch, tile by tile, on any device.

What `tamis.attention.observe` says of its arguments holds here; `width` is the longest head's
length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tamis.attention.observe_blocks import bound_scores
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


def decode_scores(
    q: torch.Tensor, kv: PagedKV, width: int, *, scale: float, softcap: float | None
) -> torch.Tensor:
    """The scores of each row's query q [n, q_heads, k_dim] over all cached tokens of the row.

    Returns:
        [n, q_heads, width], fp32; -inf beyond each head's length.
    """
    grouped = _grouped(q, kv)
    out = grouped.new_full((*grouped.shape[:3], width), -torch.inf)
    for tokens, k, visible in _key_tiles(kv, None, None):
        out[..., tokens] = masked_scores(grouped, k, visible[:, :, None], scale, softcap)
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


def softmax_tokens(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    *,
    divisors: torch.Tensor | None,
    first: int,
    last: int,
) -> torch.Tensor:
    """The softmax of scores [n, q_heads, width] over the tokens first .. length - last - 1 of each
    head, zero for the others; `lengths` int32 [n, kv_heads], `divisors` [n, q_heads] of scores.
    `scores` may be written over."""
    if divisors is not None:
        scores = scores / divisors[..., None].float()
    ends = lengths.repeat_interleave(scores.shape[1] // lengths.shape[1], 1)[..., None] - last
    at = torch.arange(scores.shape[2], device=scores.device)
    scores = scores.masked_fill((at < first) | (at >= ends), -torch.inf)
    return scores.softmax(-1).nan_to_num_(0.0) if scores.shape[2] else scores


def top_pages(
    q: torch.Tensor,
    kv: PagedKV,
    count: int,
    *,
    low: str,
    high: str,
    before: PagedKV | None,
) -> torch.Tensor:
    """Pages of largest bounds for queries q [n, q_heads, k_dim]: int64 [n, kv_heads, count]."""
    n, kv_heads = kv.lengths.shape
    out = torch.empty(n, kv_heads, count, dtype=torch.int64, device=q.device)
    grouped = _grouped(q, kv)
    for row in range(n):
        for head in range(kv_heads):
            k_min, k_max = (
                torch.cat([_summaries(part, row, head, name) for part in (before, kv) if part])
                for name in (low, high)
            )
            last = max(0, len(k_min) - 1)
            bounds = bound_scores(grouped[row, head], k_min[None, :last], k_max[None, :last])
            values = bounds.amax(0, keepdim=True)
            pages = torch.tensor([last + 1], device=q.device)
            out[row, head] = top_tokens(
                torch.nn.functional.pad(values, (0, 1)), pages, count, 0, 1
            )[0]
    return out


def top_tokens(
    values: torch.Tensor, lengths: torch.Tensor, count: int, first: int, last: int
) -> torch.Tensor:
    """Tokens of largest values [heads, tokens] and the first and last ones, int64 [heads, count];
    see `tamis.attention.observe.top_tokens`."""
    missing = max(0, count - values.shape[1])
    values = torch.nn.functional.pad(values, (0, missing))
    at = torch.arange(values.shape[1], device=values.device)
    length = lengths[:, None]
    # In the order of choice: first ones, last ones, the others by value, what is not there.
    kind = torch.where(at < length, 2, 3)
    kind = kind.masked_fill((at >= length - last) & (at < length), 1)
    kind = kind.masked_fill(at < length.clamp_max(first), 0)
    values = values.masked_fill(kind == 0, 0.0)
    values = torch.where(kind == 1, at.float(), values)  # the newest of the last ones first
    order = values.masked_fill(kind == 3, 0.0).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, kind.gather(1, order).sort(dim=1, stable=True).indices)
    return order[:, :count].sort().values


def _summaries(pages: PagedKV, row: int, head: int, name: str) -> torch.Tensor:
    """A field of one row per page, of the pages of one head: [pages, width], fp32."""
    used = -(-int(pages.lengths[row, head]) // pages.format.page_size)
    table = pages.tables[row, head, :used].long()
    return pages.format.view(pages.data, name)[table, 0].float()


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
