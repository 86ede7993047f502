"""Which tokens leave a sequence's live pages, and what becomes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tamis.engine import positions, rest
from tamis.engine.views import CachedLayer
from tamis.methods.base import Evict, resolve

if TYPE_CHECKING:
    from tamis.engine.lifecycle import Lifecycle, Owed


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
    if evict is not None and plan.budget is not None and life.generating and life.budgets is None:
        views = [CachedLayer(life, layer) for layer in range(n_layers)]
        scores = [evict.scores(view) for view in views]
        life.budgets = plan.budget.allocate(_uniform(life, evict), views, scores)
    together = evict is not None and evict.by_head and plan.merge is None and not stream
    runs = life.runs if together else [range(layer, layer + 1) for layer in range(n_layers)]
    for run in runs:
        layers = range(max(run.start, owed.evicted), run.stop)
        if layers:
            _evict(life, CachedLayer(life, layers.start, len(layers)), evict, stream)
            owed.evicted = layers.stop
    if evict is not None and evict.in_cache_positions:
        for run in life.runs:
            positions.renumber(life, run)


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


def _allotted(life: Lifecycle, evict: Evict, layers: range) -> Tensor:
    """Tokens that each head of layers of one shape may keep, int64 [layers * kv_heads]."""
    shape = life.shape.layers[layers.start]
    if life.budgets is None:
        budget = resolve(evict.budget, life.prompt_tokens)
        return torch.full((len(layers) * shape.kv_heads,), budget, device=life.device)
    return life.budgets[layers.start : layers.stop, : shape.kv_heads].flatten()


def _evict(life: Lifecycle, view: CachedLayer, evict: Evict | None, stream: bool) -> None:
    """Decide and carry out the eviction of one layer, or of several of one shape that are put to
    the method together."""
    layers, plan = view.layers, life.plan
    kept, scores = view.cached, None
    if evict is not None:
        budget = _allotted(life, evict, layers)
        window = life.shape.layers[layers.start].window
        within = view.lengths if window is None else view.lengths.clamp(max=window)
        if bool((within > budget).any()):  # what lies behind a window goes by itself
            scores = evict.scores(view)
            kept = evict.keep(view, scores, budget) & view.cached
    if stream:
        kept = _streamed(life, view, kept)
    gone = view.cached & ~kept
    counts = gone.sum(1)
    if not bool(counts.any()):
        return
    merged = None
    if plan.merge is not None and scores is not None:
        merged = plan.merge.merge(view, scores, kept)
    if int(counts.max()) == 1 and _goes_by_content(life, layers):
        leaving = torch.where(counts > 0, gone.int().argmax(1), -1)
        life.cache.take_out(layers, leaving.cpu().numpy())
    else:
        for layer, of_layer in zip(layers, kept.chunk(len(layers)), strict=True):
            life.cache.keep(layer, [head.nonzero()[:, 0].cpu().numpy() for head in of_layer])
    for layer in layers:
        life.layers[layer].summarized = 0
    if merged is not None:
        place = kept.cumsum(1) - 1
        changed = zip(place, merged.tokens, strict=True)
        indices = [at[mask].cpu().numpy() for at, mask in changed]
        sizes = merged.tokens.sum(1).tolist()
        life.cache.write(layers, indices, *(torch.split(x, sizes) for x in (merged.k, merged.v)))


def _goes_by_content(life: Lifecycle, layers: range) -> bool:
    """Whether it does not matter in which order the tokens of some layers lie: attention finds
    those of a window by it, selections and passes name tokens by where they lie."""
    plan = life.plan
    windowed = life.shape.layers[layers.start].window is not None
    return life.generating and not windowed and plan.select is None and plan.tokens is None


def _streamed(life: Lifecycle, view: CachedLayer, kept: Tensor) -> Tensor:
    """Which tokens of a layer stay once its streaming heads, too, have kept their span of the
    `kept` ones, bool [kv_heads, tokens]."""
    heads = life.plan.heads
    assert heads is not None
    assert life.streaming is not None
    sinks, recent = heads.span(life.prompt_tokens)
    at = torch.arange(kept.shape[1], device=kept.device)
    spanned = (at < sinks) | (at >= view.lengths[:, None] - recent)
    streaming = life.streaming[view.layer].to(kept.device)[:, None]
    kept = torch.where(streaming, spanned & view.cached, kept)
    if heads.compensate:
        rest.note(life, view, view.cached & ~kept & streaming)
    return kept
