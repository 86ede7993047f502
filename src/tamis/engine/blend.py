"""Contexts that were computed apart, joined in one sequence, and tokens of them computed again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tamis.attention import prefill
from tamis.attention.merge import merge_states
from tamis.attention.parts import KVPart, attend_parts
from tamis.attention.reference import gather_kv
from tamis.cache import PagedKV, SequenceCache
from tamis.engine.views import LayerOptions

if TYPE_CHECKING:
    from tamis.engine.context import Context
    from tamis.engine.encoded import State
    from tamis.engine.lifecycle import Lifecycle, ShiftKeys

KeysValues = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values that a layer makes of hidden states at positions: `Model.keys_values`."""

_QUERIES = 64
"""Scattered queries that attend at once: the tokens between them are looked at one by one."""


def reserve(cache: SequenceCache, contexts: Sequence[Context], n_following: int) -> None:
    """Make room for all that `assemble` lays out, before it copies anything.

    That is a little more than it needs where some layers have windows, whose most pages and those
    of the other layers are taken as needed at the same time.

    Args:
        As `assemble`.

    Raises:
        OutOfPages: too few pages are free. It may be called again when more are.
    """
    for layer, shape in enumerate(cache.layout.layers):
        caches = [context.cache for context in _missing(cache, contexts)]
        counts = [int(other.lengths_of(layer)[0]) for other in caches if other is not None]
        n_held = int(cache.lengths_of(layer)[0])
        n = _most_at_once(n_held, [*counts, n_following], shape.window, cache.layout.page_size)
        cache.reserve(n, range(layer, layer + 1))


def _most_at_once(n_held: int, counts: list[int], window: int | None, page_size: int) -> int:
    """Tokens that the pages of a layer must have room for beside those held, when some more are
    added one run after the other, and pages that a window has passed are freed in between."""
    if window is None:
        return sum(counts)
    held, n_pages = n_held, -(-n_held // page_size)
    left, most = n_pages, 0  # `left` of its first pages, which others may hold too
    for n in counts:
        held += n
        most = max(most, -(-held // page_size) - left)
        behind = max(0, held - window + 1) // page_size
        held, left = held - behind * page_size, max(0, left - behind)
    return (n_pages + most) * page_size - n_held


def assemble(
    cache: SequenceCache, contexts: Sequence[Context], shift_keys: ShiftKeys, n_following: int
) -> None:
    """Lay contexts out one after the other, and after them the places of tokens still to come.

    Args:
        cache: empty, or a fork of the first context.
        contexts: of exact attention.
        shift_keys: turns keys to other positions.
        n_following: how many tokens are counted as cached after the contexts; their keys, values
            and positions are arbitrary until they are written.

    Raises:
        OutOfPages: too few pages are free. It may be called again when more are.
    """
    for context in _missing(cache, contexts):
        assert context.cache is not None

        def turn(layer: int, k: Tensor, delta: int = cache.next_position) -> Tensor:
            return shift_keys(layer, k, torch.full((k.shape[1],), delta, device=k.device))

        cache.append_from(context.cache, turn)
        cache.trim()
    cache.reserve(n_following)
    cache.advance(n_following)


def _missing(cache: SequenceCache, contexts: Sequence[Context]) -> list[Context]:
    """The contexts that come after what is there already."""
    begins = itertools.accumulate((len(context.tokens) for context in contexts), initial=0)
    pairs = zip(begins, contexts, strict=False)
    return [context for at, context in pairs if at >= cache.next_position]


def deviation(life: Lifecycle, layer: int, tokens: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """How far new keys and values of tokens are from what a layer has cached of them, the L2 norm
    over both and all heads; infinite for tokens that were not reused.

    Args:
        life: whose cache it is, all of whose heads hold all tokens.
        layer: the layer.
        tokens: ascending, int64 [m].
        k: new keys, [m, kv_heads, k_dim]; v: new values, [m, kv_heads, v_dim].

    Returns:
        fp32 [m], in host memory.
    """
    assert life.fresh is not None
    first, end = int(tokens[0]), int(tokens[-1]) + 1
    at = (tokens - first).to(k.device)
    pairs = zip((k, v), life.cache.keys_values(layer, first, end), strict=True)
    squares = [
        (new.float() - old[:, at].transpose(0, 1).float()).square().sum((1, 2))
        for new, old in pairs
    ]
    return (squares[0] + squares[1]).sqrt().cpu().masked_fill_(tokens >= life.fresh, torch.inf)


def attend(
    q: Tensor, k: Tensor, v: Tensor, pages: PagedKV, at: Tensor, options: LayerOptions
) -> State:
    """Exact attention of tokens anywhere in a sequence over all tokens up to their own positions.

    Args:
        q: [tokens, q_heads, k_dim]; k, v: [tokens, kv_heads, k_dim or v_dim], in the pages already.
        pages: one row; the token at position `i` is token `i` of every head.
        at: positions of the tokens, ascending, int32 [tokens].
        options: of a layer without a window.

    Returns:
        Outputs [tokens, q_heads, v_dim] and log-sum-exps [tokens, q_heads].
    """
    how: dict[str, Any] = {"scale": options.scale, "softcap": options.softcap}
    first, last = int(at[0]), int(at[-1])
    if last - first == len(q) - 1:  # a chunk like any other, but for what follows it
        return prefill(q, k, v, _until(pages, first), positions=at, sinks=options.sinks, **how)
    blocks = [slice(start, start + _QUERIES) for start in range(0, len(q), _QUERIES)]
    parts = [_attend_block(q[block], pages, at[block], options) for block in blocks]
    out, lse = map(torch.cat, zip(*parts, strict=True))
    return out, lse


def _attend_block(q: Tensor, pages: PagedKV, at: Tensor, options: LayerOptions) -> State:
    """`attend` for few queries: all that precedes the first of them, and what lies between them."""
    first, end = int(at[0]), int(at[-1]) + 1
    k, v = (part[0] for part in gather_kv(pages, first, end))
    out, lse = prefill(
        q,
        k[:, :0].transpose(0, 1),
        v[:, :0].transpose(0, 1),
        _until(pages, first),
        scale=options.scale,
        positions=at,
        softcap=options.softcap,
        sinks=options.sinks,
        own=False,
    )
    visible = torch.arange(first, end, device=q.device) <= at[:, None]
    near = KVPart(k, v, visible[None])
    others = attend_parts(q, [near], v.shape[2], scale=options.scale, softcap=options.softcap)
    merged, lse = merge_states(out.float(), lse, *others)
    return merged.to(q.dtype), lse


def _until(pages: PagedKV, n_tokens: int) -> PagedKV:
    """The first tokens of every head."""
    return replace(pages, lengths=torch.full_like(pages.lengths, n_tokens))
