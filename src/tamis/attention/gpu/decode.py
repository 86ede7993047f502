"""Paged decode in Triton: a program per chunk of a head's tokens, then one that merges them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tamis.attention.gpu.tiles import (
    absorb,
    capped,
    dot,
    finished,
    load_positions,
    load_rows,
    padded,
    page_fields,
    page_of,
    tile_bytes,
    tile_rows,
)
from tamis.attention.pattern import TokenList
from tamis.cache.format import PagedKV

CHUNK = 512
"""Tokens of one program: results depend on it, and on nothing else about the batch."""

TILE = 64
"""The most tokens that meet the queries at once."""


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
    kv_heads, v_dim = kv.lengths.shape[1], kv.format.field("v").width
    out = q.new_empty(n, q_heads, v_dim)
    lse = q.new_empty(n, q_heads, dtype=torch.float32)
    if not n:
        return out, lse
    counts = kv.lengths if tokens is None else tokens.counts
    widest = kv.tables.shape[2] * kv.format.page_size
    chunks = max(1, -(-(widest if tokens is None else tokens.indices.shape[2]) // CHUNK))
    part = q.new_empty(n, q_heads, chunks, v_dim, dtype=torch.float32)
    part_lse = q.new_empty(n, q_heads, chunks, dtype=torch.float32)
    indices = tokens.indices.contiguous() if tokens is not None else kv.tables
    group = q_heads // kv_heads
    _partial[(n * kv_heads, chunks)](
        q.contiguous(),
        indices,
        counts.contiguous(),
        positions if positions is not None else counts,
        part,
        part_lse,
        indices.shape[2],
        chunks,
        scale,
        softcap or 1.0,
        window or 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PADDED=padded(group),
        K_DIM=k_dim,
        K_PADDED=padded(k_dim),
        V_DIM=v_dim,
        V_PADDED=padded(v_dim),
        CHUNK=CHUNK,
        TILE=tile_rows(
            TILE, (padded(k_dim) + padded(v_dim)) * q.element_size(), tile_bytes(q.device)
        ),
        ITEM=q.element_size(),
        LISTED=tokens is not None,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        **page_fields(kv, q.dtype),
    )
    merge_chunks(part, part_lse, sinks, out, lse)
    return out, lse


def merge_chunks(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fill `out` [n, q_heads, v_dim] and `lse` [n, q_heads] with the attentions over the chunks,
    fp32 [n, q_heads, chunks, v_dim] and [n, q_heads, chunks], merged in their order."""
    n, q_heads, chunks, v_dim = part.shape
    _merge[(n * q_heads,)](
        part,
        part_lse,
        sinks.float() if sinks is not None else part_lse,
        out,
        lse,
        chunks,
        Q_HEADS=q_heads,
        V_DIM=v_dim,
        V_PADDED=padded(v_dim),
        SINKS=sinks is not None,
    )


@triton.jit
def _partial(
    q,
    indices,
    counts,
    positions,
    part,
    part_lse,
    list_row,
    chunks,
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
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ITEM: tl.constexpr,
    LISTED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    AT_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Attention of the query heads of one KV head over one chunk of its tokens."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    row, kv_head = head // KV_HEADS, head % KV_HEADS
    if LISTED:
        count = tl.load(counts + head)
    else:
        count = tl.load(lengths + row * lengths_row + kv_head * lengths_head)
    table = tables + row * tables_row + kv_head * tables_head

    member = tl.arange(0, GROUP_PADDED)
    channel = tl.arange(0, K_PADDED)
    first = (row * KV_HEADS + kv_head) * GROUP
    queries = tl.load(
        q + (first + member)[:, None] * K_DIM + channel[None, :],
        mask=(member < GROUP)[:, None] & (channel < K_DIM)[None, :],
        other=0.0,
    )
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, V_PADDED], tl.float32)
    oldest = 0
    if WINDOWED:
        oldest = tl.load(positions + row).to(tl.int32) - window + 1
    for start in range(chunk * CHUNK, min(count, (chunk + 1) * CHUNK), TILE):
        token = start + tl.arange(0, TILE)
        known = token < count
        if LISTED:
            token = tl.load(indices + head * list_row + token, mask=known, other=0)
        page = page_of(table, token, known, PAGE)
        slot = token % PAGE
        k = load_rows(data, page, slot, known, UNIT, K_OFFSET, K_DIM, K_PADDED)
        v = load_rows(data, page, slot, known, UNIT, V_OFFSET, V_DIM, V_PADDED)
        seen = known
        if WINDOWED:
            at = load_positions(at_data, page, slot, known, ITEM, UNIT, AT_OFFSET)
            seen = seen & (at >= oldest)
        scores = capped(dot(queries, tl.trans(k)) * scale, softcap, CAPPED)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top, total, acc = absorb(top, total, acc, scores, v)
    result, log_sum = finished(top, total, acc)
    mine = (first + member) * chunks + chunk
    channel = tl.arange(0, V_PADDED)
    tl.store(part_lse + mine, log_sum, mask=member < GROUP)
    tl.store(
        part + mine[:, None] * V_DIM + channel[None, :],
        result,
        mask=(member < GROUP)[:, None] & (channel < V_DIM)[None, :],
    )


@triton.jit
def _merge(
    part,
    part_lse,
    sinks,
    out,
    lse,
    chunks,
    Q_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge the chunks of one query head, in their order."""
    head = tl.program_id(0)
    channel = tl.arange(0, V_PADDED)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if SINKS:
        top = tl.zeros([1], tl.float32) + tl.load(sinks + head % Q_HEADS)
        total += 1
    acc = tl.zeros([V_PADDED], tl.float32)
    for chunk in range(chunks):
        log_sum = tl.load(part_lse + head * chunks + chunk)
        values = tl.load(
            part + (head * chunks + chunk) * V_DIM + channel, mask=channel < V_DIM, other=0.0
        )
        new_top = tl.maximum(top, log_sum)
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, shrunk = tl.exp(log_sum - origin), tl.exp(top - origin)
        acc = acc * shrunk + values * weight
        total = total * shrunk + weight
        top = new_top
    empty = total == 0  # a NaN is not nothing
    total = tl.where(empty, 1.0, total)
    tl.store(out + head * V_DIM + channel, (acc / total), mask=channel < V_DIM)
    one = tl.arange(0, 1)
    tl.store(lse + head + one, tl.where(empty, float("-inf"), top + tl.log(total)))
