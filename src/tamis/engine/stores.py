"""Where a sequence's tokens lie beside its live pages: encoded, shared by two layers, in host
memory, or summed up in one token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tamis.attention.encoding import PageEncoding
from tamis.attention.parts import KVPart
from tamis.cache import Field, OutOfPages, PagedKV, PageFormat, Store
from tamis.cache.pool import IntArray
from tamis.cache.transfers import Transfers
from tamis.engine import rest
from tamis.engine.views import CachedLayer
from tamis.methods.views import Column

if TYPE_CHECKING:
    from tamis.engine.lifecycle import Lifecycle

CODEC, SHARE, HOST = "codec", "share", "host"

POSITION = "position"

_PIECE = 32
"""Pages of each head that are encoded or decoded at once: never a whole cache."""


class HostReads:
    """What one step reads of host memory: all pages of the stores there, layer by layer.

    Where the device is another memory they come to it in this order, each sequence's pages of a
    layer while those before them are read and what lies between is computed (`Transfers.ahead`).
    They are known beforehand because nothing selects among them: every step reads all. A plan that
    read only some of them, chosen by the query, could not have them on their way.

    Args:
        lives: of the step's sequences, in the order in which every layer attends.
    """

    def __init__(self, lives: Iterable[Lifecycle | None]) -> None:
        held = [life for life in lives if life is not None and HOST in life.cache.stores]
        transfers = held[0].cache.cache.transfers if held else None
        self._ahead = None if transfers is None else _Ahead(transfers, held)

    def __call__(self, life: Lifecycle, layer: int) -> PagedKV | None:
        """The pages of a layer that lie in host memory, to be read before the next are asked for;
        None where there are none."""
        if not _in_host(life, layer):
            return None
        if self._ahead is None:
            return life.cache.store_pages(HOST, layer)
        return self._ahead(life, layer)


class _Ahead:
    """The pages of all layers of some lives, which hold stores in host memory, as `HostReads` has
    them on their way."""

    def __init__(self, transfers: Transfers, lives: Sequence[Lifecycle]) -> None:
        self._transfers = transfers
        self._ids: dict[tuple[Lifecycle, int], IntArray] = {}
        laid: list[IntArray] = []
        for layer in range(lives[0].shape.n_layers):
            for life in lives:
                if _in_host(life, layer):
                    ids, *of_rows = life.cache.stores[HOST].laid_out(layer)
                    self._ids[life, layer] = ids
                    laid += of_rows
        flat = np.concatenate([np.zeros(0, np.int32), *(array.ravel() for array in laid)])
        # At once, because the host waits for the device when it sends them.
        sent = torch.from_numpy(flat).to(lives[0].device)
        parts = torch.split(sent, [array.size for array in laid])
        shaped = [part.view(array.shape) for part, array in zip(parts, laid, strict=True)]
        pairs = zip(shaped[::2], shaped[1::2], strict=True)
        self._rows = dict(zip(self._ids, pairs, strict=True))  # tables and lengths
        self._next = dict(pairwise(self._ids))
        self._coming: tuple[tuple[Lifecycle, int], Callable[[], Tensor]] | None = None

    def __call__(self, life: Lifecycle, layer: int) -> PagedKV:
        """The pages, while what is read after them begins to come."""
        read, coming = (life, layer), self._coming
        arrive = coming[1] if coming is not None and coming[0] == read else self._begin(*read)
        following = self._next.get(read)
        self._coming = None if following is None else (following, self._begin(*following))
        format = life.cache.stores[HOST].formats[layer]
        return PagedKV(arrive(), format, *self._rows[read])

    def _begin(self, life: Lifecycle, layer: int) -> Callable[[], Tensor]:
        store = life.cache.stores[HOST]
        return self._transfers.ahead(store.pool(store.rows(layer)), self._ids[life, layer])


def declare(life: Lifecycle) -> None:
    """Declare the stores that the plan's methods fill.

    Raises:
        PlanError: a method does not fit the model's sizes.
    """
    plan, cache = life.plan, life.cache
    size = cache.layout.page_size
    if plan.codec is not None:
        summaries = _summaries(life)
        formats = {
            layer: _format(size, [*_codec_columns(life, layer), *summaries])
            for layer in _whole_layers(life)
        }
        if formats:
            cache.add_store(CODEC, formats)
    if plan.share is not None:
        formats = {}
        for pair in _pairs(life):
            shape = life.shape.layers[pair[0]]
            columns = plan.share.columns(shape.k_dim, shape.v_dim, life.shape.dtype)
            formats |= dict.fromkeys(pair, _format(size, columns))
        if formats:
            cache.add_store(SHARE, formats)
    if plan.place is not None:
        layout = cache.layout
        bases = {i: layout.formats[layout.layer_formats[i]] for i in _whole_layers(life)}
        if bases:
            cache.add_store(HOST, bases, tier="host")
    if plan.heads is not None and plan.heads.compensate:
        formats = {
            i: rest.page_format(layer.k_dim, layer.v_dim, life.shape.dtype)
            for i, layer in enumerate(life.shape.layers)
        }
        cache.add_store(rest.STORE, formats)


def held(life: Lifecycle) -> bool:
    """Whether any token lies in a store."""
    return any(bool(store.lengths.any()) for store in life.cache.stores.values())


def held_apart(life: Lifecycle) -> bool:
    """Whether any token lies in a store that decode steps do not read with those of other
    sequences (`readable`)."""
    return any(
        bool(store.lengths.any())
        for name, store in life.cache.stores.items()
        if name != CODEC or _encoding(life) is None
    )


def readable(life: Lifecycle) -> tuple[Store, PageEncoding] | None:
    """The store of encoded pages, and how attention reads them where they lie; None where it
    cannot, or there are none."""
    store, encoding = life.cache.stores.get(CODEC), _encoding(life)
    if store is None or encoding is None or not store.lengths.any():
        return None
    return store, encoding


def act(life: Lifecycle, *, at_end: bool) -> None:
    """Move to stores what the plan's methods want there at this moment; to do so again has no
    further effect.

    Raises:
        OutOfPages: too few pages are free for what is encoded or shared; what was not done is as
            it was. Pages for which host memory is full just stay on the device, as they are.
    """
    plan = life.plan
    if plan.select is not None and plan.select.summaries(1, torch.float32):
        _summarize(life)
    if plan.codec is not None and life.generating:
        _encode(life)
    if plan.share is not None and at_end:
        _share(life)
    if plan.place is not None:
        with contextlib.suppress(OutOfPages):
            _offload(life)


def parts(
    life: Lifecycle, layer: int, pages: Tensor | None = None, *, encoded: bool = True
) -> Iterator[KVPart]:
    """What lies in the encoded, shared and rest stores of a layer, piece by piece.

    Args:
        life: whose.
        layer: the layer.
        encoded: whether to read the encoded pages.
        pages: only these encoded pages, per head ascending, int64 [kv_heads, n]; those that a head
            does not have are passed over. None for all.
    """
    plan, cache = life.plan, life.cache
    if encoded and layer in _covered(life, CODEC):
        yield from _encoded(life, layer, pages)
    if plan.share is not None and layer in _covered(life, SHARE):
        lengths = cache.store_length(SHARE, layer)
        size = cache.layout.page_size
        member = next(pair.index(layer) for pair in _pairs(life) if layer in pair)
        for first in range(0, -(-int(lengths.max()) // size), _PIECE):
            page = cache.stored(SHARE, layer, first, first + _PIECE)
            k, v = plan.share.restore(page, member)
            at = torch.arange(first * size, first * size + k.shape[1], device=k.device)
            yield KVPart(k, v, (at < int(lengths.max()))[None, None])
    if plan.heads is not None and plan.heads.compensate:
        part = rest.part(life, layer)
        if part is not None:
            yield part


def encoded_lengths(life: Lifecycle, layer: int) -> Tensor:
    """Tokens of each head in encoded pages, int64 [kv_heads]."""
    heads = life.shape.layers[layer].kv_heads
    if layer not in _covered(life, CODEC):
        return torch.zeros(heads, dtype=torch.int64, device=life.device)
    return torch.from_numpy(life.cache.store_length(CODEC, layer).copy()).long().to(life.device)


def encoded_pages(life: Lifecycle, layer: int) -> PagedKV | None:
    """The encoded pages of a layer, one row; None where there are none."""
    if layer not in _covered(life, CODEC):
        return None
    store = life.cache.stores[CODEC]
    rows = store.rows(layer)
    return store.paged(rows) if store.lengths[rows].any() else None


def summary(life: Lifecycle, layer: int, name: str) -> Tensor:
    """A summary of every page that has one, encoded pages first: [kv_heads, pages, width]."""
    full = max(life.layers[layer].summarized or [0])
    live = life.cache.summaries(layer, name)[:, :full].flatten(2)
    encoded = encoded_lengths(life, layer) // life.cache.layout.page_size
    most = int(encoded.max())
    if not most:
        return live
    stored = life.cache.stored(CODEC, layer, 0, most, (name,))[name]
    joined = torch.cat([stored.flatten(2), live], dim=1)
    # Where a head has fewer encoded pages than another, its live ones come earlier.
    at = torch.arange(joined.shape[1], device=joined.device).expand(len(joined), -1)
    source = torch.where(at < encoded[:, None], at, at + (most - encoded)[:, None])
    source = source.clamp_max(joined.shape[1] - 1)
    return joined.gather(1, source[..., None].expand_as(joined))


def _encoded(life: Lifecycle, layer: int, pages: Tensor | None) -> Iterator[KVPart]:
    """The encoded pages of a layer, decoded a few at a time."""
    codec, cache = life.plan.codec, life.cache
    assert codec is not None
    size = cache.layout.page_size
    lengths = encoded_lengths(life, layer)
    held = lengths // size
    names = tuple(c.name for c in _codec_columns(life, layer) if c.name != POSITION)
    for first in range(0, int(held.max()), _PIECE):
        last = min(first + _PIECE, int(held.max()))
        k, v = codec.decode(_paged(cache.stored(CODEC, layer, first, last, names), size))
        at = torch.arange(first, last, device=held.device)
        real = at < held[:, None]
        if pages is not None:
            real &= (pages[:, :, None] == at).any(1)
        if not bool(real.any()):
            continue
        visible = None if bool(real.all()) else real.repeat_interleave(size, 1)[:, None]
        yield KVPart(k.flatten(1, 2), v.flatten(1, 2), visible)


def _encode(life: Lifecycle) -> None:
    """Encode the live pages that are older than the residual."""
    codec, cache = life.plan.codec, life.cache
    assert codec is not None
    size = cache.layout.page_size
    for layer in _whole_layers(life):
        rows, piece = cache.layout.rows(layer), _PIECE
        while True:
            n_pages = np.maximum(cache.lengths[rows] - codec.residual, 0) // size
            if life.streaming is not None:
                n_pages[life.streaming[layer].cpu().numpy()] = 0
            n_pages = np.minimum(n_pages, piece)
            if not n_pages.any():
                break
            try:
                _encode_pages(life, layer, n_pages)
            except OutOfPages:  # one page at a time needs the fewest
                if piece == 1:
                    raise
                piece = 1


def _encode_pages(life: Lifecycle, layer: int, n_pages: np.ndarray) -> None:
    """Encode the first `n_pages` [kv_heads] live pages of every head of a layer.

    Raises:
        OutOfPages: the encoded pages do not fit; heads that were not encoded are as they were.
    """
    codec, cache = life.plan.codec, life.cache
    assert codec is not None
    size, most = cache.layout.page_size, int(n_pages.max())
    k, v = cache.keys_values(layer, 0, most * size)
    k, v = (_in_pages(_padded(x, most * size), size) for x in (k, v))
    fields = codec.encode(k, v, CachedLayer(life, layer))
    for column in _summaries(life):
        fields[column.name] = cache.summaries(layer, column.name)[:, :most]
    if life.plan.drops:
        position = cache.column(layer, POSITION)[:, : most * size]
        fields[POSITION] = _in_pages(_padded(position, most * size), size)
    cache.unshare(range(layer, layer + 1))
    if summarized := life.layers[layer].summarized:
        life.layers[layer].summarized = np.maximum(np.array(summarized) - n_pages, 0).tolist()
    per_token = {c.name for c in _codec_columns(life, layer) if c.rows is None}
    for n in np.unique(n_pages[n_pages > 0]).tolist():
        heads = np.flatnonzero(n_pages == n).tolist()
        chosen = {name: values[heads, :n] for name, values in fields.items()}
        chosen = {
            name: values.flatten(1, 2) if name in per_token else values
            for name, values in chosen.items()
        }
        cache.put(CODEC, (layer,), n * size, chosen, heads=heads)
        cache.drop_front(layer, np.where(n_pages == n, n, 0))


def _share(life: Lifecycle) -> None:
    """Merge the tokens of each pair of layers that the plan's method merges."""
    share, cache = life.plan.share, life.cache
    assert share is not None
    for pair in _pairs(life):
        if cache.store_length(SHARE, pair[0]).any():
            continue
        cache.unshare(range(pair[0], pair[0] + 1))
        cache.unshare(range(pair[1], pair[1] + 1))
        first, second = (cache.keys_values(layer) for layer in pair)
        merged, fields = share.merge(first, second)
        count = int(merged.sum())
        if not count:
            continue
        cache.put(SHARE, pair, count, fields)
        kept = (~merged).nonzero()[:, 0].cpu().numpy()
        for layer in pair:
            cache.keep(layer, [kept] * life.shape.layers[layer].kv_heads)


def _offload(life: Lifecycle) -> None:
    """Move the full pages of heads that do not stay on the device to host memory."""
    place, cache = life.plan.place, life.cache
    assert place is not None
    size = cache.layout.page_size
    resident = place.on_device(life.shape)
    for layer in _covered(life, HOST):
        n_pages = cache.lengths[cache.layout.rows(layer)] // size
        n_pages[resident[layer].cpu().numpy()] = 0
        if not n_pages.any():
            continue
        cache.unshare(range(layer, layer + 1))
        heads, most = np.flatnonzero(n_pages).tolist(), int(n_pages.max())
        k, v = cache.keys_values(layer, 0, most * size)
        position = cache.column(layer, POSITION)[:, : most * size]
        fields = {"k": k[heads], "v": v[heads], POSITION: position[heads]}
        cache.put(HOST, (layer,), most * size, fields, heads=heads)
        cache.drop_front(layer, n_pages)


def _summarize(life: Lifecycle) -> None:
    """Build the summaries of live pages that have filled since the last time."""
    select, cache = life.plan.select, life.cache
    assert select is not None
    size = cache.layout.page_size
    full = (cache.lengths // size).tolist()
    for layer in _whole_layers(life):
        mine, now = life.layers[layer], full[cache.layout.rows(layer)]
        if now == mine.summarized:
            continue
        before = mine.summarized or [0] * len(now)
        grown = [(old, new) for old, new in zip(before, now, strict=True) if new > old]
        # From the first page that any head has filled to the last: of the others nothing changes.
        begin, end = min(grown, default=(0, 0))[0], max((new for _, new in grown), default=0)
        for first in range(begin, end, _PIECE):
            last = min(first + _PIECE, end)
            k = _padded(cache.keys_values(layer, first * size, last * size)[0], size)
            for name, values in select.summarize(_in_pages(k, size)).items():
                cache.set_summaries(layer, name, first, values[:, :, None])
        mine.summarized = now


def _in_host(life: Lifecycle, layer: int) -> bool:
    """Whether any token of a layer lies in host memory."""
    return layer in _covered(life, HOST) and bool(life.cache.store_length(HOST, layer).any())


def _encoding(life: Lifecycle) -> PageEncoding | None:
    return None if life.plan.codec is None else life.plan.codec.encoding()


def _covered(life: Lifecycle, name: str) -> Collection[int]:
    """The layers that a store covers; none if there is no such store."""
    store = life.cache.stores.get(name)
    return () if store is None else store.formats


def _pairs(life: Lifecycle) -> list[tuple[int, int]]:
    """The pairs of layers that can share their KV: of one shape, and without a sliding window."""
    assert life.plan.share is not None
    layers = life.shape.layers
    return [
        (first, second)
        for first, second in life.plan.share.pairs(len(layers))
        if layers[first] == layers[second] and layers[first].window is None
    ]


def _whole_layers(life: Lifecycle) -> list[int]:
    """The layers without a sliding window: the others forget by themselves."""
    return [i for i, layer in enumerate(life.shape.layers) if layer.window is None]


def _summaries(life: Lifecycle) -> list[Column]:
    select = life.plan.select
    if select is None:
        return []
    return select.summaries(life.shape.layers[0].k_dim, life.shape.dtype)


def _codec_columns(life: Lifecycle, layer: int) -> list[Column]:
    """The fields of a layer's encoded pages; positions among them only where they are not simply
    0, 1, 2, ..., because something was dropped."""
    assert life.plan.codec is not None
    shape = life.shape.layers[layer]
    size = life.cache.layout.page_size
    columns = life.plan.codec.columns(size, shape.k_dim, shape.v_dim, life.shape.dtype)
    if not life.plan.drops:
        return columns
    return [*columns, Column(POSITION, torch.int32, 1)]


def _format(page_size: int, columns: list[Column]) -> PageFormat:
    fields = tuple(Field(c.name, c.dtype, c.width, c.rows) for c in columns)
    return PageFormat(page_size, fields)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """[kv_heads, n, dim] with zeros up to a multiple of so many tokens."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % multiple))


def _in_pages(x: Tensor, page_size: int) -> Tensor:
    """[kv_heads, pages * page_size, width] as [kv_heads, pages, page_size, width]."""
    return x.reshape(x.shape[0], -1, page_size, x.shape[2])


def _paged(fields: dict[str, Tensor], page_size: int) -> dict[str, Tensor]:
    """Fields as a codec's `encode` returned them: those with a row per token page by page."""
    return {name: x if x.dim() == 4 else _in_pages(x, page_size) for name, x in fields.items()}
