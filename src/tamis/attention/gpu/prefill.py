"""Prefill in Triton: dense, windowed, and by a pattern's lists; one program per tile of queries
of one head."""

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
from tamis.attention.pattern import SparsePattern
from tamis.cache.format import PagedKV, PageFormat

QUERIES = 64
"""The most query tokens of one program."""

KEYS = 64
"""The most keys that they meet at once."""

NEVER = tl.constexpr(-(2**31))
"""The bound of indices of a sweep that is not at work."""


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
    tokens, q_heads, k_dim = q.shape
    kv_heads, v_dim = v.shape[1:]
    out = q.new_empty(tokens, q_heads, v_dim)
    lse = q.new_empty(tokens, q_heads, dtype=torch.float32)
    if not tokens:
        return out, lse
    if past is None:
        past = _nothing(k, v)
    block = tokens if pattern is None else pattern.block
    item = q.element_size()
    queries = tile_rows(QUERIES, padded(k_dim) * item, tile_bytes(q.device))
    keys = tile_rows(KEYS, (padded(k_dim) + padded(v_dim)) * item, tile_bytes(q.device))
    tiles_per_block = -(-block // queries)
    q_blocks = -(-tokens // block)
    lists = _lists(pattern, past, tokens)
    _prefill[(q_blocks * tiles_per_block, q_heads)](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        positions.int().contiguous(),
        sinks.float() if sinks is not None else lse,
        *lists,
        out,
        lse,
        tokens,
        block,
        tiles_per_block,
        scale,
        softcap or 1.0,
        window or 0,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        K_DIM=k_dim,
        K_PADDED=padded(k_dim),
        V_DIM=v_dim,
        V_PADDED=padded(v_dim),
        QUERIES=queries,
        KEYS=keys,
        ITEM=item,
        OWN=own,
        SPARSE=pattern is not None,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        **page_fields(past, q.dtype),
    )
    return out, lse


def _nothing(k: torch.Tensor, v: torch.Tensor) -> PagedKV:
    """One row of pages that hold no token."""
    format = PageFormat.dense(16, k.shape[2], v.shape[2], k.dtype)
    data = torch.zeros(format.page_bytes, dtype=torch.uint8, device=k.device)
    nothing = torch.zeros(1, k.shape[1], 1, dtype=torch.int32, device=k.device)
    return PagedKV(data, format, nothing, nothing[..., 0])


def _lists(
    pattern: SparsePattern | None, past: PagedKV, tokens: int
) -> tuple[torch.Tensor | int, ...]:
    """A pattern as the kernel takes it.

    Returns:
        Its `block_starts`, `blocks`, `column_starts`, `columns`; windows, int32 [q_heads], -1 for a
        head that sees everything; which key blocks each query block lists, uint8 [q_heads,
        q_blocks, key_blocks]; which keys are columns, uint8 [q_heads, keys]; and both widths. What
        a query sees twice is thereby counted once.
    """
    if pattern is None:
        none = past.lengths
        return none, none, none, none, none, none, none, 0, 0, 0
    heads, device = pattern.q_heads, pattern.blocks.device
    windows = pattern.window if pattern.window is not None else torch.zeros(heads, device=device)
    if pattern.full is not None:
        windows = windows.masked_fill(pattern.full, -1)
    keys = past.tables.shape[2] * past.format.page_size + tokens
    key_blocks = -(-keys // pattern.block)
    starts = pattern.block_starts.long()
    listed = torch.zeros(heads * pattern.q_blocks, key_blocks, dtype=torch.uint8, device=device)
    owner = torch.repeat_interleave(starts.diff(dim=1).flatten())
    inside = pattern.blocks < key_blocks
    listed[owner[inside], pattern.blocks[inside].long()] = 1
    columns = torch.zeros(heads, keys, dtype=torch.uint8, device=device)
    owner = torch.repeat_interleave(pattern.column_starts.long().diff())
    inside = pattern.columns < keys
    columns[owner[inside], pattern.columns[inside].long()] = 1
    return (
        pattern.block_starts.contiguous(),
        torch.cat([pattern.blocks, pattern.blocks.new_zeros(1)]),  # at least one to point at
        pattern.column_starts.contiguous(),
        pattern.columns.contiguous(),
        windows.int().contiguous(),
        listed,
        columns,
        pattern.q_blocks,
        key_blocks,
        keys,
    )


@triton.jit
def _load_kv(
    key,
    known,
    length,
    table,
    data,
    k,
    v,
    kv_head,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    OWN: tl.constexpr,
    UNIT: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Keys and values of key indices [n], from the pages or from the chunk."""
    cached = known & (key < length)
    page = page_of(table, key, cached, PAGE)
    slot = key % PAGE
    keys = load_rows(data, page, slot, cached, UNIT, K_OFFSET, K_DIM, K_PADDED)
    values = load_rows(data, page, slot, cached, UNIT, V_OFFSET, V_DIM, V_PADDED)
    if OWN:
        mine = known & (key >= length)
        row = (key - length).to(tl.int64) * KV_HEADS + kv_head
        k_channel, v_channel = tl.arange(0, K_PADDED), tl.arange(0, V_PADDED)
        k_mask = mine[:, None] & (k_channel < K_DIM)[None, :]
        v_mask = mine[:, None] & (v_channel < V_DIM)[None, :]
        own_k = tl.load(k + row[:, None] * K_DIM + k_channel[None, :], mask=k_mask, other=0.0)
        own_v = tl.load(v + row[:, None] * V_DIM + v_channel[None, :], mask=v_mask, other=0.0)
        keys, values = tl.where(k_mask, own_k, keys), tl.where(v_mask, own_v, values)
    return keys, values, page, slot


@triton.jit
def _prefill(
    q,
    k,
    v,
    positions,
    sinks,
    block_starts,
    blocks,
    column_starts,
    columns,
    windows,
    listed,
    is_column,
    q_blocks,
    key_blocks,
    most_keys,
    out,
    lse,
    tokens,
    block,
    tiles_per_block,
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
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ITEM: tl.constexpr,
    OWN: tl.constexpr,
    SPARSE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    UNIT: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    AT_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One tile of queries of one head; with a pattern a tile lies in one query block.

    The keys come in up to three sweeps: everything up to the tile (or the heads' listed blocks),
    columns outside of these blocks, and the pattern's window without what was seen before.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (Q_HEADS // KV_HEADS)
    q_block, within = tile // tiles_per_block, tile % tiles_per_block
    first = q_block * block + within * QUERIES
    query = first + tl.arange(0, QUERIES)
    real = (query < tokens) & (query < (q_block + 1) * block)
    last = tl.minimum(tl.minimum(first + QUERIES, tokens), (q_block + 1) * block)

    channel = tl.arange(0, K_PADDED)
    row = query.to(tl.int64) * Q_HEADS + head
    queries = tl.load(
        q + row[:, None] * K_DIM + channel[None, :],
        mask=real[:, None] & (channel < K_DIM)[None, :],
        other=0.0,
    )
    at = tl.load(positions + query, mask=real, other=0)
    length = tl.load(lengths + kv_head * lengths_head)
    table = tables + kv_head * tables_head
    end = length
    if OWN:
        end += last  # no later key is seen

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if SINKS:
        top = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + head)
        total += 1
    acc = tl.zeros([QUERIES, V_PADDED], tl.float32)

    # The first sweep: what is cached, then the chunk from the first key that the window reaches.
    n_cached = (length + KEYS - 1) // KEYS
    own_start = length
    if WINDOWED:
        own_start += tl.maximum(first - window + 1, 0)
    n_first = n_cached + (tl.maximum(end - own_start, 0) + KEYS - 1) // KEYS
    n_steps = n_first
    if SPARSE:
        span = tl.load(windows + head)
        everything = span < 0
        start = block_starts + head * (q_blocks + 1) + q_block
        first_block, first_column = tl.load(start), tl.load(column_starts + head)
        n_columns = tl.load(column_starts + head + 1) - first_column
        tiles_of_block = (block + KEYS - 1) // KEYS
        n_listed = (tl.load(start + 1) - first_block) * tiles_of_block
        n_first = tl.where(everything, n_first, n_listed)
        to_columns = n_first + tl.where(everything, 0, (n_columns + KEYS - 1) // KEYS)
        oldest = tl.maximum(length + first - span + 1, 0)
        n_window = (tl.maximum(end - oldest, 0) + KEYS - 1) // KEYS
        n_steps = to_columns + tl.where(span > 0, n_window, 0)
        seen_blocks = listed + (head * q_blocks + q_block) * key_blocks
        seen_columns = is_column + head * most_keys
    for step in range(n_steps):
        offset = tl.arange(0, KEYS)
        in_past = step < n_cached
        key = tl.where(in_past, step * KEYS, own_start + (step - n_cached) * KEYS) + offset
        bound = tl.where(in_past, length, end)
        if SPARSE:
            in_blocks = (step < n_first) & (span >= 0)
            in_columns = (step >= n_first) & (step < to_columns)
            in_window = step >= to_columns
            inside = (step % tiles_of_block) * KEYS + offset
            at_block = tl.where(in_blocks, first_block + step // tiles_of_block, 0)
            block_key = tl.load(blocks + at_block) * block + inside
            index = (step - n_first) * KEYS + offset
            is_there = index < tl.where(in_columns, n_columns, NEVER)
            column = tl.load(columns + first_column + index, mask=is_there, other=0)
            window_key = oldest + (step - to_columns) * KEYS + offset

            known = key < tl.where(in_blocks | in_columns | in_window, 0, bound)
            known = known | (inside < tl.where(in_blocks, block, 0)) | is_there
            known = known | (window_key < tl.where(in_window, end, NEVER))
            key = tl.where(in_blocks, block_key, tl.where(in_columns, column, key))
            key = tl.where(in_window, window_key, key)
            known = known & (key < end)
            twice = known & (key < tl.where(in_columns | in_window, end, 0))
            before = tl.load(seen_blocks + key // block, mask=twice, other=0)
            twice = known & (key < tl.where(in_window, end, 0))
            before |= tl.load(seen_columns + key, mask=twice, other=0)
            known = known & (before == 0)
        else:
            known = key < bound
        keys, values, page, slot = _load_kv(
            key, known, length, table, data, k, v, kv_head,
            KV_HEADS, K_DIM, K_PADDED, V_DIM, V_PADDED, OWN, UNIT, K_OFFSET, V_OFFSET, PAGE,
        )  # fmt: skip
        seen = known[None, :] & (key[None, :] <= (length + query)[:, None])
        if SPARSE:
            reach = tl.where(in_window, span, most_keys)
            seen = seen & (key[None, :] > (length + query - reach)[:, None])
        if WINDOWED:
            cached = known & (key < length)
            key_at = load_positions(at_data, page, slot, cached, ITEM, UNIT, AT_OFFSET)
            if OWN:
                mine = known & (key >= length)
                key_at += tl.load(positions + key - length, mask=mine, other=0)
            seen = seen & (key_at[None, :] > (at - window)[:, None])
        scores = capped(dot(queries, tl.trans(keys)) * scale, softcap, CAPPED)
        scores = tl.where(seen, scores, float("-inf"))
        top, total, acc = absorb(top, total, acc, scores, values)

    result, log_sum = finished(top, total, acc)
    channel = tl.arange(0, V_PADDED)
    tl.store(lse + row, log_sum, mask=real)
    tl.store(
        out + row[:, None] * V_DIM + channel[None, :],
        result,
        mask=real[:, None] & (channel < V_DIM)[None, :],
    )
