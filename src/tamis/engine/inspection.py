"""Fills a `Trace`: what each step computed and read, and what the cache holds at the end."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tamis.attention.pattern import TokenList
from tamis.cache import PagedKV
from tamis.cache.pool import IntArray
from tamis.engine import rest, stores
from tamis.engine.lifecycle import Lifecycle
from tamis.engine.trace import LIVE, WAITING, ReadStep, Trace
from tamis.methods.base import resolve


def note_chunk(life: Lifecycle, layer: int, past: Tensor, n: int, share: float = 1.0) -> None:
    """Record the attention of several queries at once: a chunk of the prompt, or a draft.

    Args:
        life: whose; does nothing where nobody asked.
        layer: the layer.
        past: live tokens before the chunk per KV head, integers [kv_heads].
        n: the chunk's queries.
        share: of the pairs, what was computed.
    """
    if life.trace is None:
        return
    past = past + _beside(life, layer)
    if life.generating:
        _note_read(life, layer, past + n, past + n)
        return
    window = life.shape.layers[layer].window
    seen = past[:, None] + torch.arange(1, n + 1, device=past.device)
    if window is not None:
        seen = seen.clamp_max(window)
    life.trace.count_pairs(layer, share * float(seen.sum(1).float().mean()))


def note_seen(life: Lifecycle, layer: int, seen: int, n: int) -> None:
    """Record the attention of a pass whose `n` queries see `seen` cached tokens and their own."""
    if life.trace is None:
        return
    if life.generating:
        heads = life.shape.layers[layer].kv_heads
        read = torch.full((heads,), seen + n)
        _note_read(life, layer, read, torch.full((heads,), len(life.aside.held[layer]) + n))
    else:
        life.trace.count_pairs(layer, n * seen + n * (n + 1) / 2)


def note_decode(
    life: Lifecycle,
    layer: int,
    pages: PagedKV,
    live: PagedKV,
    listed: TokenList | None = None,
    encoded: Tensor | None = None,
) -> None:
    """Record the attention of one query.

    Args:
        life: whose; does nothing where nobody asked.
        layer: the layer.
        pages: the layer's live pages, one row, the query's own token among them.
        live: those of them that were read.
        listed: the only tokens of `pages` that were read; None for all of `live`.
        encoded: numbers of the pages that were read, encoded and live, per head ascending, int64
            [kv_heads, n]; those that a head does not have are passed over. None for all.
    """
    if life.trace is None:
        return
    if not life.generating:
        note_chunk(life, layer, pages.lengths[0] - 1, 1)
        return
    size = pages.format.page_size
    before, beside = life.encoded_lengths(layer), _beside(life, layer)
    read = live.lengths[0] if listed is None else listed.counts[0]
    numbers = None
    if encoded is not None:
        in_store = (encoded >= 0) & (encoded < (before // size)[:, None])
        beside = beside - before + in_store.sum(1) * size
        n_pages = -(-(before + pages.lengths[0]) // size)
        real = (encoded >= 0) & (encoded < n_pages[:, None])
        numbers = _listed(encoded, real)
    elif listed is not None:
        real = torch.arange(listed.indices.shape[2], device=read.device) < read[:, None]
        numbers = _listed(listed.indices[0] // size, real)
    cached = pages.lengths[0] + _beside(life, layer)
    _note_read(life, layer, read + beside, cached, numbers)


def finish(trace: Trace, life: Lifecycle) -> None:
    """Record what the cache of a sequence holds at its end, before its pages are freed.

    A sequence that ends while it is swapped out holds nothing that could be looked at.
    """
    cache, shape = life.cache, life.shape
    if cache.swapped:
        return
    trace.budgets = _budgets(life)
    # Beyond these may lie the draft of a step that was the last.
    n_tokens = life.prompt_tokens + life.generated
    for i, layer in enumerate(shape.layers):
        numbers = [_numbers(life, i, head, n_tokens) for head in range(layer.kv_heads)]
        trace.positions.append(numbers)
        trace.bytes.append(_bytes(life, i))
        trace.dense_bytes.append(_dense_bytes(life, i, n_tokens))


def _note_read(
    life: Lifecycle,
    layer: int,
    read: Tensor,
    cached: Tensor,
    pages: tuple[tuple[int, ...], ...] | None = None,
) -> None:
    """Record what a step after the prompt read, tokens [kv_heads] each."""
    assert life.trace is not None
    window = life.shape.layers[layer].window
    if window is not None:
        read = read.clamp_max(window)
    life.trace.reads.append(
        ReadStep(life.generated, layer, tuple(read.tolist()), tuple(cached.tolist()), pages)
    )


def _listed(numbers: Tensor, real: Tensor) -> tuple[tuple[int, ...], ...]:
    """The distinct real ones of each head's numbers [kv_heads, n], ascending."""
    per_head = zip(numbers.cpu().numpy(), real.cpu().numpy(), strict=True)
    return tuple(tuple(np.unique(head[its]).tolist()) for head, its in per_head)


def _beside(life: Lifecycle, layer: int) -> Tensor:
    """Tokens of each head that lie in stores, int64 [kv_heads]."""
    total = np.zeros(life.shape.layers[layer].kv_heads, dtype=np.int64)
    for name, store in life.cache.stores.items():
        if name != rest.STORE and layer in store.formats:
            total += store.lengths[store.rows(layer)]
    return torch.from_numpy(total).to(life.device)


def _numbers(life: Lifecycle, layer: int, head: int, n_tokens: int) -> IntArray:
    """The numbers of the tokens that a head holds, wherever they lie, ascending."""
    cache = life.cache
    live = cache.positions(layer, head)
    parts = [_renumbered(life, layer, live)]
    held = {
        name: int(store.lengths[store.rows(layer)][head])
        for name, store in cache.stores.items()
        if layer in store.formats and name != rest.STORE
    }
    if held.get(stores.CODEC) and not life.plan.drops:
        parts.append(np.arange(held[stores.CODEC], dtype=np.int32))
    elif held.get(stores.CODEC):
        parts.append(_renumbered(life, layer, _stored(life, stores.CODEC, layer, head, held)))
    if held.get(stores.HOST):
        parts.append(_stored(life, stores.HOST, layer, head, held))
    if held.get(stores.SHARE):  # nothing is dropped beside it: what is not live was merged
        parts.append(np.setdiff1d(np.arange(n_tokens, dtype=np.int32), live))
    numbers = np.sort(np.concatenate(parts))
    return numbers[numbers < n_tokens]


def _stored(life: Lifecycle, name: str, layer: int, head: int, held: dict[str, int]) -> IntArray:
    """The positions that a store holds of a head."""
    field = life.cache.stored(name, layer, fields=(stores.POSITION,))[stores.POSITION]
    positions: IntArray = field[head, : held[name], 0].cpu().numpy()
    return positions


def _renumbered(life: Lifecycle, layer: int, positions: IntArray) -> IntArray:
    """Numbers of the tokens at these positions: not the same once a program of passes has moved
    the prompt's tokens together."""
    if not life.position_shift:
        return positions
    moved = life.aside.held[layer].numpy().astype(np.int32)
    numbers = positions + np.int32(life.position_shift)
    own = positions < len(moved)
    numbers[own] = moved[positions[own]]
    return numbers


def _budgets(life: Lifecycle) -> list[list[int]] | None:
    """What the plan lets each KV head keep, [layers][kv_heads]; None without an eviction."""
    heads = [layer.kv_heads for layer in life.shape.layers]
    if life.budgets is not None:
        return [row[:n].tolist() for row, n in zip(life.budgets, heads, strict=True)]
    if life.plan.evict is None:
        return None
    uniform = resolve(life.plan.evict.budget, life.prompt_tokens)
    return [[uniform] * n for n in heads]


def _bytes(life: Lifecycle, layer: int) -> dict[str, int]:
    """Bytes of a layer's pages, and of the hidden states that wait there, by what they are."""
    rows = life.cache.layout.rows(layer)
    found = {LIVE: int(life.cache.page_counts[rows].sum()) * life.cache.pool(rows).page_bytes}
    for name, store in life.cache.stores.items():
        if layer not in store.formats:
            continue
        rows = store.rows(layer)
        counts = np.zeros_like(store.page_counts)
        counts[rows] = store.page_counts[rows]
        ids, holders = np.unique(store.held()[0], return_counts=True)
        mine = np.searchsorted(ids, store.held(counts)[0])
        found[name] = round(store.pool(rows).page_bytes * float((1 / holders[mine]).sum()))
    found[WAITING] = life.aside.waiting_bytes(layer)
    return {name: n for name, n in found.items() if n or name == LIVE}


def _dense_bytes(life: Lifecycle, layer: int, n_tokens: int) -> int:
    """Bytes of the pages of exact attention for `n_tokens` tokens, side columns left out."""
    layout = life.cache.cache.layout
    window = layout.layers[layer].window
    first = 0 if window is None else max(n_tokens - window + 1, 0) // layout.page_size
    pages = layout.layers[layer].kv_heads * (-(-n_tokens // layout.page_size) - first)
    return pages * layout.formats[layout.layer_formats[layer]].page_bytes
