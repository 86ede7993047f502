"""Statistics of attention in Triton: scores and weights of queries over cached tokens, column
sums, bounds of pages.

What `tamis.attention.observe` says of its arguments holds here; `width` is the longest head's
length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tamis.attention import observe_reference
from tamis.attention.gpu.tiles import (
    capped,
    dot,
    load_positions,
    load_rows,
    padded,
    page_fields,
    page_of,
    tile_rows,
)
from tamis.cache.format import UNIT, PagedKV

KEYS = 64
"""The most cached tokens, or pages, of one program."""

QUERIES = 64
"""The most queries that meet them at once."""

TILE_BYTES = 1 << 14
"""Of queries, and of keys, in such a meeting."""


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
    n, q_heads, _ = q.shape
    out = q.new_empty(q_heads, n, width, dtype=torch.float32)
    by_head = q.transpose(0, 1).contiguous()
    _run(by_head, kv, None, out, width, scale, positions, window, softcap, of_rows=False)
    return out


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
    out = q.new_empty(q.shape[1], width, dtype=torch.float32)
    by_head = q.transpose(0, 1).contiguous()
    lse = lse.T.float().contiguous()
    _run(by_head, kv, lse, out, width, scale, positions, window, softcap, of_rows=False, sums=True)
    return out


def decode_scores(
    q: torch.Tensor, kv: PagedKV, width: int, *, scale: float, softcap: float | None
) -> torch.Tensor:
    """The scores of each row's query q [n, q_heads, k_dim] over all cached tokens of the row.

    Returns:
        [n, q_heads, width], fp32; -inf beyond each head's length.
    """
    out = q.new_empty(*q.shape[:2], width, dtype=torch.float32)
    _run(q.contiguous(), kv, None, out, width, scale, None, None, softcap, of_rows=True)
    return out


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
    out = q.new_empty(*q.shape[:2], width, dtype=torch.float32)
    lse = lse.float().contiguous()
    _run(q.contiguous(), kv, lse, out, width, scale, positions, window, softcap, of_rows=True)
    return out


def top_pages(
    q: torch.Tensor,
    kv: PagedKV,
    count: int,
    *,
    low: str,
    high: str,
    before: PagedKV | None,
) -> torch.Tensor:
    """Pages of largest bounds for queries q [n, q_heads, k_dim]: int64 [n, kv_heads, count].

    The bounds are one launch for each of `before` and `kv`; the largest are found by sorting.
    """
    n, kv_heads = kv.lengths.shape
    parts = [kv] if before is None else [before, kv]
    held = [-(-part.lengths // part.format.page_size) for part in parts]
    bounds = q.new_zeros(n, kv_heads, sum(p.tables.shape[2] for p in parts), dtype=torch.float32)
    first = torch.zeros_like(held[0])
    q = q.contiguous()
    for part, pages in zip(parts, held, strict=True):
        _fill_bounds(q, part, low, high, first, bounds)
        first = first + pages
    counts = first.flatten().long()
    return observe_reference.top_tokens(bounds.flatten(0, 1), counts, count, 0, 1).view(
        n, kv_heads, count
    )


def _fill_bounds(
    q: torch.Tensor, kv: PagedKV, low: str, high: str, first: torch.Tensor, out: torch.Tensor
) -> None:
    """Put the bounds of each head's pages into out[row, head, first[row, head] ..]."""
    n, q_heads, k_dim = q.shape
    kv_heads, most = kv.tables.shape[1:]
    if not n or not most:
        return
    group, item = q_heads // kv_heads, q.element_size()
    pages = tile_rows(KEYS, padded(k_dim) * item, TILE_BYTES)
    _bounds[(n * kv_heads, -(-most // pages))](
        q,
        kv.data.view(q.dtype),
        kv.tables,
        kv.lengths,
        first,
        out,
        out.shape[2],
        kv.tables.stride(0),
        kv.tables.stride(1),
        kv.lengths.stride(0),
        kv.lengths.stride(1),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PADDED=padded(group),
        K_DIM=k_dim,
        K_PADDED=padded(k_dim),
        PAGES=pages,
        PAGE=kv.format.page_size,
        UNIT=UNIT // item,
        LOW_OFFSET=kv.format.offsets[low] // item,
        HIGH_OFFSET=kv.format.offsets[high] // item,
    )


@triton.jit
def _bounds(
    q,
    data,
    tables,
    lengths,
    first,
    out,
    width,
    tables_row,
    tables_head,
    lengths_row,
    lengths_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    LOW_OFFSET: tl.constexpr,
    HIGH_OFFSET: tl.constexpr,
):
    """The bounds of some pages of one head: the largest of its queries'."""
    head = tl.program_id(0)
    row, kv_head = head // KV_HEADS, head % KV_HEADS
    length = tl.load(lengths + row * lengths_row + kv_head * lengths_head)
    number = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    known = number * PAGE < length
    table = tables + row * tables_row + kv_head * tables_head
    page = tl.load(table + number, mask=known, other=0).to(tl.int64)
    slot = number * 0
    least = load_rows(data, page, slot, known, UNIT, LOW_OFFSET, K_DIM, K_PADDED)
    most = load_rows(data, page, slot, known, UNIT, HIGH_OFFSET, K_DIM, K_PADDED)
    member, channel = tl.arange(0, GROUP_PADDED), tl.arange(0, K_PADDED)
    queries = tl.load(
        q + (head * GROUP + member)[:, None] * K_DIM + channel[None, :],
        mask=(member < GROUP)[:, None] & (channel < K_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    positive = tl.maximum(queries, 0.0).to(least.dtype)
    negative = tl.minimum(queries, 0.0).to(least.dtype)
    bounds = dot(positive, tl.trans(most)) + dot(negative, tl.trans(least))
    bounds = tl.max(tl.where((member < GROUP)[:, None], bounds, float("-inf")), 0)
    at = head.to(tl.int64) * width + tl.load(first + head) + number
    tl.store(out + at, bounds, mask=known)


def _run(
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor | None,
    out: torch.Tensor,
    width: int,
    scale: float,
    positions: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    *,
    of_rows: bool,
    sums: bool = False,
) -> None:
    """Fill `out` with scores, with weights where there is `lse`, or with their sums.

    Args:
        q: `of_rows` [n, q_heads, k_dim], each row's query reading its own row of pages, the group's
            heads together; otherwise [q_heads, n, k_dim], all reading the one row.
    """
    kv_heads = kv.lengths.shape[1]
    if of_rows:
        programs, queries = q.shape[0] * kv_heads, q.shape[1] // kv_heads
    else:
        programs, queries = q.shape[0], q.shape[1]
    if not width or not programs:
        return
    rows = tile_rows(KEYS, padded(q.shape[2]) * q.element_size(), TILE_BYTES)
    _observe[(programs, -(-width // rows))](
        q,
        lse if lse is not None else out,
        positions.int().contiguous() if positions is not None else kv.lengths,
        out,
        queries,
        width,
        programs // kv_heads,
        scale,
        softcap or 1.0,
        window or 0,
        KV_HEADS=kv_heads,
        K_DIM=q.shape[2],
        K_PADDED=padded(q.shape[2]),
        QUERIES=min(QUERIES, rows, padded(queries)),
        KEYS=rows,
        ITEM=q.element_size(),
        OF_ROWS=of_rows,
        WEIGHTS=lse is not None,
        SUMS=sums,
        POSITIONED=positions is not None,
        WINDOWED=window is not None and positions is not None,
        CAPPED=softcap is not None,
        **page_fields(kv, q.dtype),
    )


@triton.jit
def _observe(
    q,
    lse,
    positions,
    out,
    queries,
    width,
    group,
    scale,
    softcap,
    window,
    data,
    at_data,
    tables,
    lengths,
    tables_row,
    tables_head,
    lengths_row,
    lengths_head,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ITEM: tl.constexpr,
    OF_ROWS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SUMS: tl.constexpr,
    POSITIONED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    AT_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One tile of keys and all queries that read them in this program: `queries` consecutive rows
    of q, from the first of them on."""
    program, tile = tl.program_id(0), tl.program_id(1)
    row, kv_head = 0, program // group
    if OF_ROWS:
        row, kv_head = program // KV_HEADS, program % KV_HEADS
    length = tl.load(lengths + row * lengths_row + kv_head * lengths_head)
    table = tables + row * tables_row + kv_head * tables_head
    key = tile * KEYS + tl.arange(0, KEYS)
    known = key < length
    page = page_of(table, key, known, PAGE)
    slot = key % PAGE
    k = load_rows(data, page, slot, known, UNIT, K_OFFSET, K_DIM, K_PADDED)
    key_at = load_positions(at_data, page, slot, known, ITEM, UNIT, AT_OFFSET)
    channel = tl.arange(0, K_PADDED)
    sums = tl.zeros([KEYS], tl.float32)
    for start in range(0, queries, QUERIES):
        query = start + tl.arange(0, QUERIES)
        real = query < queries
        at_q = (program * queries).to(tl.int64) + query
        rows = tl.load(
            q + at_q[:, None] * K_DIM + channel[None, :],
            mask=real[:, None] & (channel < K_DIM)[None, :],
            other=0.0,
        )
        scores = capped(dot(rows, tl.trans(k)) * scale, softcap, CAPPED)
        seen = known[None, :] & real[:, None]
        if POSITIONED:
            if OF_ROWS:
                at = tl.load(positions + row) + query * 0
            else:
                at = tl.load(positions + query, mask=real, other=0)
            seen = seen & (key_at[None, :] <= at[:, None])
            if WINDOWED:
                seen = seen & (key_at[None, :] > (at - window)[:, None])
        if WEIGHTS:
            norm = tl.load(lse + at_q, mask=real, other=float("-inf"))
            seen = seen & (norm != float("-inf"))[:, None]
            scores = tl.exp(scores - tl.where(norm == float("-inf"), 0.0, norm)[:, None])
            scores = tl.where(seen, scores, 0.0)
        else:
            scores = tl.where(seen, scores, float("-inf"))
        if SUMS:
            sums += tl.sum(scores, 0)
        else:
            tl.store(
                out + at_q[:, None] * width + key[None, :],
                scores,
                mask=real[:, None] & (key < width)[None, :],
            )
    if SUMS:
        tl.store(out + program.to(tl.int64) * width + key, sums, mask=key < width)
