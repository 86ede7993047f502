"""One step's attention: append the new keys and values, then decode and prefill over the pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tamis.attention import decode, prefill
from tamis.attention.merge import merge_sinks, merge_states
from tamis.attention.narrow import narrowed
from tamis.attention.parts import KVPart, attend_parts
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.attention.reference import gather, gather_kv
from tamis.attention.reference import tiles as tile_spans
from tamis.cache import BatchView, PagedKV
from tamis.engine import blend, encoded, inspection, stores
from tamis.engine.encoded import EncodedDecode, State
from tamis.engine.lifecycle import Lifecycle
from tamis.engine.patterns import streaming_pattern
from tamis.engine.shared import SharedDecode
from tamis.engine.views import DecodeQuery, LayerOptions, PromptChunk


class StepAttention:
    """What every layer of the model calls back with the queries, keys and values of a step.

    Args:
        view: the step's sequences and their pages.
        counts: new tokens of each sequence; those with one token come first, and among them those
            whose plan is `direct`.
        positions: int32 [tokens], absolute position of each new token.
        lives: each sequence's plan at work, None for exact attention.
        trees: each sequence's draft tree, bool [count, count] which of its new tokens each sees;
            None where each sees those before it.
    """

    def __init__(
        self,
        view: BatchView,
        counts: Sequence[int],
        positions: Tensor,
        lives: Sequence[Lifecycle | None],
        trees: Sequence[Tensor | None],
    ) -> None:
        self._view = view
        self._positions = positions
        self._lives = lives
        self._trees = trees
        self._listening = [
            (i, life) for i, life in enumerate(lives) if life is not None and life.listens
        ]
        self._n_decode = sum(count == 1 for count in counts)
        plain = [life is None or life.direct for life in lives[: self._n_decode]]
        self._n_plain = plain.index(False) if False in plain else self._n_decode
        self._shared = SharedDecode.of(view, self._n_plain)
        self._encoded = EncodedDecode(lives[: self._n_plain])
        self._host = stores.HostReads(lives[self._n_plain :])
        self._spans: list[tuple[int, int]] = []  # first token and end of each sequence
        end = 0
        for count in counts:
            self._spans.append((end, end + count))
            end += count

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one layer for all tokens of the step.

        Args:
            layer: the layer's index.
            q: [tokens, q_heads, k_dim]; k: [tokens, kv_heads, k_dim]; v: [tokens, kv_heads, v_dim].
            scale, window, softcap, sinks: as in `tamis.attention.decode`.

        Returns:
            [tokens, q_heads, v_dim], of q's dtype.
        """
        options = LayerOptions(scale, window, softcap, sinks)
        self._view.append(layer, k, v)
        parts = []
        n = self._n_plain
        if n:
            if self._shared is not None and window is None:
                state = self._shared(layer, q[:n], options)
            else:
                pages = self._view.pages(layer, 0, n, with_new=True)
                state = _decode(q[:n], pages, options, self._positions[:n])
            parts.append(self._encoded(layer, q[:n], state, options))
        for life in self._lives:
            if life is not None:
                life.layers[layer].options = options
        for i in range(n, len(self._spans)):
            start, end = self._spans[i]
            life, own = self._lives[i], slice(start, end)
            if life is not None and life.fresh is not None:
                pages = self._view.pages(layer, i, i + 1, with_new=True)
                at = self._positions[own]
                parts.append(blend.attend(q[own], k[own], v[own], pages, at, options))
            elif end - start == 1 and life is not None:
                parts.append(self._decode_one(life, layer, i, q[own], options))
            else:
                parts.append(self._prefill(life, layer, i, q[own], k[own], v[own], options))
        out, lse = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        for i, life in self._listening:
            self._observe(life, layer, i, q, v, lse, options)
        return out

    def _observe(
        self,
        life: Lifecycle,
        layer: int,
        i: int,
        q: Tensor,
        v: Tensor,
        lse: Tensor,
        options: LayerOptions,
    ) -> None:
        """Give a sequence's plan what it needs to see of the layer."""
        start, end = self._spans[i]
        if life.fresh is not None:  # what is computed again is nobody's question
            start += int((self._positions[start:end] < life.fresh).sum())
        own = slice(start, end)
        if start == end:
            return
        pages = self._view.pages(layer, i, i + 1, with_new=True)
        if i < self._n_plain:
            inspection.note_decode(life, layer, pages, pages)
        life.observe(layer, q[own], v[own], lse[own], pages, self._positions[own])

    def _decode_one(
        self, life: Lifecycle, layer: int, i: int, q: Tensor, options: LayerOptions
    ) -> State:
        """One query of a sequence that reads less than its live pages, or more."""
        pages = self._view.pages(layer, i, i + 1, with_new=True)
        at = self._positions[self._spans[i][0] : self._spans[i][1]]
        if life.sees is not None:
            return _attend_seen(life, layer, q, pages, at, options)
        chosen = None
        select = life.plan.select
        if select is not None and life.generating and options.window is None:
            chosen = life.ask(lambda: select.select(DecodeQuery(life, layer, q, pages)))
        listed: TokenList | None = None
        live, numbers = pages, None
        if chosen is not None and chosen.pages is not None:
            numbers, before = chosen.pages, None
            if life.plan.codec is not None:
                before = life.encoded_lengths(layer)[None] // pages.format.page_size
            live = narrowed(pages, numbers[None], before)
        elif chosen is not None and chosen.tokens is not None:
            real = chosen.tokens < pages.lengths[0][:, None]
            listed = TokenList(chosen.tokens[None].int(), real.sum(1)[None].int())
        state = _decode(q, live, options, at, listed)
        state = self._with_stores(life, layer, q, state, options, numbers)
        inspection.note_decode(life, layer, pages, live, listed, numbers)
        if chosen is not None and chosen.rest is not None and chosen.rest_weight is not None:
            out, lse = state
            group = q.shape[1] // len(chosen.rest)
            value = chosen.rest.repeat_interleave(group, 0)
            out = torch.lerp(out[0].float(), value.float(), chosen.rest_weight[:, None])
            state = out[None].to(q.dtype), lse
        return state

    def _prefill(
        self,
        life: Lifecycle | None,
        layer: int,
        i: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: LayerOptions,
    ) -> State:
        """A chunk of a prompt, or a draft tree."""
        start, end = self._spans[i]
        past = self._view.pages(layer, i, i + 1, with_new=False)
        at = self._positions[start:end]
        if life is not None and life.sees is not None:
            pages = self._view.pages(layer, i, i + 1, with_new=True)
            return _attend_seen(life, layer, q, pages, at, options)
        tree = self._trees[i]
        how: dict[str, Any] = {
            "scale": options.scale,
            "window": options.window,
            "softcap": options.softcap,
        }
        if tree is not None:
            state = prefill(q, k, v, past, positions=at, sinks=options.sinks, own=False, **how)
            visible = tree
            if options.window is not None:
                visible = tree & (at[:, None] - at < options.window)
            part = KVPart(k.transpose(0, 1), v.transpose(0, 1), visible[None])
            grown = attend_parts(
                q, [part], v.shape[2], scale=options.scale, softcap=options.softcap
            )
            state = _merged(state, grown)
            if life is not None:
                inspection.note_chunk(life, layer, past.lengths[0], len(q))
        else:
            pattern = self._pattern(life, layer, i, q, at)
            state = prefill(
                q, k, v, past, positions=at, sinks=options.sinks, pattern=pattern, **how
            )
            if life is not None and life.trace is not None:
                share = 1.0 if pattern is None else pattern.density(past.lengths[0], len(q))
                inspection.note_chunk(life, layer, past.lengths[0], len(q), share)
        if life is not None:
            state = self._with_stores(life, layer, q, state, options, None)
        return state

    def _pattern(
        self, life: Lifecycle | None, layer: int, i: int, q: Tensor, at: Tensor
    ) -> SparsePattern | None:
        """Which pairs of a chunk are computed; None for all."""
        if life is None or life.generating:
            return None
        plan, pattern = life.plan, None
        pages = self._view.pages(layer, i, i + 1, with_new=True)
        prefill = plan.prefill
        if prefill is not None and life.shape.layers[layer].window is None:
            chunk = PromptChunk(life, layer, q, pages, at)
            pattern = life.ask(lambda: prefill.pattern(chunk))
        if plan.heads is not None and plan.heads.during_prefill and life.streaming is not None:
            span = plan.heads.span(life.prompt_tokens)
            lengths = pages.lengths[0] - len(q)
            pattern = streaming_pattern(pattern, life.streaming[layer], q.shape, lengths, span)
        return pattern

    def _with_stores(
        self,
        life: Lifecycle,
        layer: int,
        q: Tensor,
        state: State,
        options: LayerOptions,
        chosen: Tensor | None,
    ) -> State:
        """`state` merged with attention over what lies beside the live pages, of the encoded pages
        only those `chosen`, numbers [kv_heads, n], where given."""
        host = self._host(life, layer)
        if host is not None:
            how: dict[str, Any] = {"scale": options.scale, "softcap": options.softcap}
            if len(q) == 1:
                state = _merged(state, decode(q, host, **how))
            else:
                empty = q.new_empty(len(q), host.lengths.shape[1], q.shape[2])
                values = q.new_empty(*empty.shape[:2], state[0].shape[2])
                at = torch.arange(len(q), device=q.device)
                state = _merged(
                    state, prefill(q, empty, values, host, positions=at, own=False, **how)
                )
        read = stores.readable(life) if len(q) == 1 else None
        pages = stores.encoded_pages(life, layer) if read is not None else None
        if read is not None and pages is not None:
            pages = pages if chosen is None else narrowed(pages, chosen[None])
            state = encoded.merged(state, q, pages, read[1], options)
        held = stores.held(life)
        rest = list(stores.parts(life, layer, chosen, encoded=read is None)) if held else []
        if rest:
            v_dim = state[0].shape[2]
            part = attend_parts(q, rest, v_dim, scale=options.scale, softcap=options.softcap)
            state = _merged(state, part)
        return state


def _decode(
    q: Tensor,
    pages: PagedKV,
    options: LayerOptions,
    positions: Tensor,
    tokens: TokenList | None = None,
) -> State:
    return decode(
        q,
        pages,
        scale=options.scale,
        positions=positions,
        window=options.window,
        softcap=options.softcap,
        sinks=options.sinks,
        tokens=tokens,
    )


def _merged(state: State, other: State) -> State:
    """Both partial attentions as one, in the dtype of the first."""
    out, lse = merge_states(state[0].float(), state[1], other[0].float(), other[1])
    return out.to(state[0].dtype), lse


def _attend_seen(
    life: Lifecycle, layer: int, q: Tensor, pages: PagedKV, at: Tensor, options: LayerOptions
) -> State:
    """Attention of a pass's queries over the tokens that it names and its own, each query seeing
    those up to its own position."""
    assert life.sees is not None
    held = life.aside.held[layer]
    seen = torch.cat([torch.isin(held, life.sees), torch.ones(len(q), dtype=torch.bool)])
    inspection.note_seen(life, layer, int(seen.sum()) - len(q), len(q))

    def tiles() -> Iterator[KVPart]:
        for start, stop in tile_spans(pages):
            k, v = gather_kv(pages, start, stop)
            positions = gather(pages, "position", start, stop)[0, :, None, :, 0]
            visible = seen[start:stop].to(q.device) & (positions <= at[:, None])
            if options.window is not None:
                visible &= positions > at[:, None] - options.window
            yield KVPart(k[0], v[0], visible)

    v_dim = pages.format.field("v").width
    out, lse = attend_parts(q, tiles(), v_dim, scale=options.scale, softcap=options.softcap)
    if options.sinks is not None:
        out, lse = merge_sinks(out, lse, options.sinks)
    return out.to(q.dtype), lse
