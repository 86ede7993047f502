"""Which tokens leave a sequence's live pages, and what becomes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tamis.engine import rest
from tamis.engine.views import CachedLayer
from tamis.methods.base import Evict, resolve

if TYPE_CHECKING:
    from tamis.engine.lifecycle import Lifecycle, Owed

SHIFT = "shift"
"""The side column of how far a token's key was rotated beyond its own position."""


def act(life: Lifecycle, owed: Owed) -> None:
    """Evict what the plan's methods let go at this moment.

    Args:
        life: whose cache it is.
        owed: when this is; it counts the layers that are done.

    Raises:
        OutOfPages: too few pages are free; the layers that are not done are as they were.
    """
    plan, n_layers = life.plan, life.shape.n_layers
    if owed.evicted == n_layers:
        return
    evict = plan.evict if plan.evict is not None and _due(life, plan.evict, owed) else None
    stream = plan.heads is not None and (life.generating or plan.heads.during_prefill)
    if evict is None and not (stream and _overlong(life, owed)):
        owed.evicted = n_layers
        return
    life.cache.unshare()
    views = [CachedLayer(life, layer) for layer in range(n_layers)]
    scores: list[Tensor | None] = [None] * len(views)
    shares = plan.budget if life.generating and life.budgets is None else None
    if evict is not None and shares is not None:
        given = [evict.scores(view) for view in views]
        life.budgets = shares.allocate(_uniform(life, evict), views, given)
        scores = [*given]
    for layer in range(owed.evicted, n_layers):
        _evict_layer(life, views[layer], evict, scores[layer], stream)
        owed.evicted = layer + 1


def _due(life: Lifecycle, evict: Evict, owed: Owed) -> bool:
    if owed.at_end or owed.late:
        return True
    if not life.generating:
        return evict.per_chunk
    return evict.interval is not None and life.generated % evict.interval == 0


def _overlong(life: Lifecycle, owed: Owed) -> bool:
    """Whether the streaming heads hold a page more than they need: single tokens are not worth
    the moves."""
    if life.streaming is None or life.plan.heads is None:
        return False
    span = sum(life.plan.heads.span(life.prompt_tokens))
    slack = 0 if owed.at_end or not life.generating else life.cache.layout.page_size - 1
    for layer, streaming in enumerate(life.streaming):
        lengths = life.cache.lengths[life.cache.layout.rows(layer)]
        if bool((lengths[streaming.cpu().numpy()] > span + slack).any()):
            return True
    return False


def _uniform(life: Lifecycle, evict: Evict) -> Tensor:
    """What every head keeps without a budget method, int64 [layers, kv_heads], padded with 0."""
    heads = torch.tensor([layer.kv_heads for layer in life.shape.layers], device=life.device)
    columns = torch.arange(int(heads.max()), device=life.device)
    budget = resolve(evict.budget, life.prompt_tokens)
    return torch.where(columns < heads[:, None], budget, 0)


def _evict_layer(
    life: Lifecycle, view: CachedLayer, evict: Evict | None, scores: Tensor | None, stream: bool
) -> None:
    """Decide and carry out one layer's eviction."""
    layer, plan = view.layer, life.plan
    kept = view.cached
    if evict is not None:
        allotted = life.budgets if life.budgets is not None else _uniform(life, evict)
        budget = allotted[layer, : len(view.lengths)]
        window = life.shape.layers[layer].window
        within = view.lengths if window is None else view.lengths.clamp(max=window)
        if bool((within > budget).any()):  # what lies behind a window goes by itself
            scores = evict.scores(view) if scores is None else scores
            kept = evict.keep(view, scores, budget) & view.cached
    if stream and life.streaming is not None and plan.heads is not None:
        sinks, recent = plan.heads.span(life.prompt_tokens)
        at = torch.arange(kept.shape[1], device=kept.device)
        spanned = (at < sinks) | (at >= view.lengths[:, None] - recent)
        streaming = life.streaming[layer].to(kept.device)[:, None]
        kept = torch.where(streaming, spanned & view.cached, kept)
        if plan.heads.compensate:
            rest.note(life, view, view.cached & ~kept & streaming)
    if bool((kept == view.cached).all()):
        return
    merged = None
    if plan.merge is not None and scores is not None:
        merged = plan.merge.merge(view, scores, kept)
    cache = life.cache
    cache.keep(layer, [head.nonzero()[:, 0].cpu().numpy() for head in kept])
    life.layers[layer].summarized = 0
    if merged is not None:
        k, v = ([part[mask] for part, mask in zip(values, kept, strict=True)] for values in merged)
        lengths = cache.lengths[cache.layout.rows(layer)].tolist()
        cache.write(layer, [torch.arange(n).numpy() for n in lengths], k, v)
    if evict is not None and evict.in_cache_positions:
        _reposition(life, layer)


def _reposition(life: Lifecycle, layer: int) -> None:
    """Rotate keys so that a head's tokens attend as if they lay at consecutive positions that end
    at the newest token's (StreamingLLM, section 3.2). The newest ones need not be touched: only
    distances count."""
    view = CachedLayer(life, layer)
    shift = life.cache.column(layer, SHIFT)[..., 0].long()
    newest = life.cache.next_position - 1
    at = torch.arange(shift.shape[1], device=shift.device)
    wanted = newest - view.lengths[:, None] + 1 + at - view.positions
    wanted = wanted.masked_fill(~view.cached, 0)
    moved = wanted != shift
    if not bool(moved.any()):
        return
    k, _ = view.keys_values()
    indices = [head.nonzero()[:, 0] for head in moved]
    keys = [
        life.shift_keys(layer, k[head, at], (wanted - shift)[head, at])
        for head, at in enumerate(indices)
    ]
    life.cache.write(layer, [at.cpu().numpy() for at in indices], keys)
    life.cache.set_column(layer, SHIFT, wanted[..., None])
