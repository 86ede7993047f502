"""How much memory a request takes under its plan, as far as that is known beforehand."""

from __future__ import annotations

from tamis.cache import PagedCache
from tamis.engine.lifecycle import columns
from tamis.methods.base import resolve
from tamis.methods.views import ModelShape
from tamis.plan import Plan


def prompt_tokens_held(plan: Plan, n_prompt: int, chunk: int, page_size: int) -> int:
    """The most tokens per KV head that the device holds until a prompt is computed."""
    held = n_prompt
    if plan.evict is not None and plan.evict.per_chunk and plan.merge is None:
        held = min(held, resolve(plan.evict.budget, n_prompt) + chunk)
    return held


def added_at_once(plan: Plan, chunk: int) -> int | None:
    """The most tokens that a layer with a window takes in before it drops what lies behind its
    window; None for all of them: under a program of passes, that waits for the program's end."""
    return chunk if plan.tokens is None else None


def prompt_bytes(
    cache: PagedCache, shape: ModelShape, plan: Plan, n_prompt: int, chunk: int
) -> int:
    """Bytes of pages that a prompt takes until it is computed, in chunks of `chunk` tokens."""
    layout, _ = cache.rows_with(columns(plan, shape))
    if plan.place is not None:
        resident = sum(int(heads.sum()) for heads in plan.place.on_device(shape))
        share = resident / layout.n_rows
        tail = layout.bytes_for(min(n_prompt, chunk + layout.page_size))
        return round(share * layout.bytes_for(n_prompt) + (1 - share) * tail)
    held = prompt_tokens_held(plan, n_prompt, chunk, layout.page_size)
    if added_at_once(plan, chunk) is None:
        return layout.bytes_of(layout.peak_pages(held))
    return layout.bytes_for(held)
