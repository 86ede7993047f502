"""Decode over encoded pages in Triton: codes become numbers in registers, a tile at a time.

A program reads a chunk of a head's pages; the chunks are merged as those of `decode` are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from tamis.attention.encoding import PageEncoding, Quantized
from tamis.attention.gpu.decode import merge_chunks
from tamis.attention.gpu.side import PRECISION, Side, column_channels, restored, side
from tamis.attention.gpu.tiles import MIN_DOT, absorb, capped, dot, finished, padded
from tamis.cache.format import PagedKV, PageFormat

CHUNK = 256
"""Tokens of one program, in whole pages: results depend on it, and on nothing else about the
batch."""

TILE = 32
"""The most tokens that meet the queries at once."""

TILE_ELEMENTS = 4096
"""The most elements of a tile, where it has more than MIN_DOT tokens: what registers and shared
memory hold in fp32."""


def decode(
    q: torch.Tensor,
    kv: PagedKV,
    encoding: PageEncoding,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tamis.attention.encoded.decode_encoded`, whose docstring holds."""
    n, q_heads, _ = q.shape
    kv_heads = kv.lengths.shape[1]
    k, v, tile = _layout(kv.format, encoding)
    out = q.new_empty(n, q_heads, v.dim, dtype=torch.float32)
    lse = q.new_empty(n, q_heads, dtype=torch.float32)
    if not n:
        return out, lse
    pages = max(1, CHUNK // kv.format.page_size)
    chunks = max(1, -(-kv.tables.shape[2] // pages))
    part = q.new_empty(n, q_heads, chunks, v.dim, dtype=torch.float32)
    part_lse = q.new_empty(n, q_heads, chunks, dtype=torch.float32)
    group = q_heads // kv_heads
    _partial[(n * kv_heads, chunks)](
        q.contiguous(),
        part,
        part_lse,
        kv.data,
        kv.data.view(torch.int16),
        *(kv.data.view(of.floats) for of in (k, v)),
        *(kv.data.view(of.numbers) for of in (k, v)),
        kv.tables,
        kv.lengths,
        kv.tables.stride(0),
        kv.tables.stride(1),
        kv.lengths.stride(0),
        kv.lengths.stride(1),
        chunks,
        scale,
        softcap or 1.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PADDED=padded(group),
        PAGE=kv.format.page_size,
        PAGES=pages,
        TILE=tile,
        K=k,
        V=v,
        CAPPED=softcap is not None,
    )
    merge_chunks(part, part_lse, None, out, lse)
    return out, lse


@lru_cache(maxsize=256)
def _layout(format: PageFormat, encoding: PageEncoding) -> tuple[Side, Side, int]:
    """Where the kernel finds keys and values, and tokens of a tile.

    A tile lies in one page, and where it can in one group of tokens.
    """
    rows = (encoding.k.rows, encoding.v.rows)
    groups = [r.group for r in rows if isinstance(r, Quantized) and r.along == "tokens"]
    k, v = side(format, "k", encoding.k), side(format, "v", encoding.v)
    tile = min(TILE, TILE_ELEMENTS // max(k.columns, v.columns))
    while any(whole % tile for whole in (format.page_size, *groups)):
        tile //= 2
    return k, v, max(MIN_DOT, tile)


@triton.jit
def _partial(
    q,
    part,
    part_lse,
    octets,
    words,
    k_floats,
    v_floats,
    k_numbers,
    v_numbers,
    tables,
    lengths,
    tables_row,
    tables_head,
    lengths_row,
    lengths_head,
    chunks,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    TILE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Attention of the query heads of one KV head over one chunk of its pages."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    row, kv_head = head // KV_HEADS, head % KV_HEADS
    held = tl.load(lengths + row * lengths_row + kv_head * lengths_head) // PAGE
    table = tables + row * tables_row + kv_head * tables_head

    member = tl.arange(0, GROUP_PADDED)
    channel, real = column_channels(K)
    first = head * GROUP
    queries = tl.load(
        q + (first + member)[:, None] * K.dim + channel[None, :],
        mask=(member < GROUP)[:, None] & real[None, :],
        other=0.0,
    ).to(tl.float32)
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, V.columns], tl.float32)
    tiles: tl.constexpr = (PAGE + TILE - 1) // TILE
    for step in range(chunk * PAGES * tiles, min(held, (chunk + 1) * PAGES) * tiles):
        page = tl.load(table + step // tiles).to(tl.int64)
        start = (step % tiles) * TILE
        k = restored(page, start, octets, words, k_floats, k_numbers, K, PAGE, TILE)
        scores = capped(dot(queries, tl.trans(k), PRECISION) * scale, softcap, CAPPED)
        known = start + tl.arange(0, TILE) < PAGE
        scores = tl.where(known[None, :], scores, float("-inf"))
        v = restored(page, start, octets, words, v_floats, v_numbers, V, PAGE, TILE)
        top, total, acc = absorb(top, total, acc, scores, v, PRECISION)
    result, log_sum = finished(top, total, acc)
    mine = (first + member) * chunks + chunk
    channel, real = column_channels(V)
    tl.store(part_lse + mine, log_sum, mask=member < GROUP)
    tl.store(
        part + mine[:, None] * V.dim + channel[None, :],
        result,
        mask=(member < GROUP)[:, None] & real[None, :],
    )
