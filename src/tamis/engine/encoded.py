"""What a decode step reads of encoded pages: for sequences of one codec together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.attention.encoded import decode_encoded
from tamis.attention.encoding import PageEncoding
from tamis.attention.merge import merge_states
from tamis.cache import PagedKV, PageFormat, Store, together
from tamis.engine import stores
from tamis.engine.lifecycle import Lifecycle
from tamis.engine.views import LayerOptions

State = tuple[Tensor, Tensor]
"""A partial attention: out [tokens, q_heads, v_dim] and lse [tokens, q_heads]."""


@dataclass(frozen=True)
class _Batch:
    """Sequences whose encoded pages are alike.

    Attributes:
        index: which of the step's queries are theirs, int64 [n]; None for all.
        encoding: how attention reads their pages.
        store: of the first; its formats and rows are those of all.
        tables, lengths: of all layers' rows, int32 [n, rows, pages] and [n, rows].
    """

    index: Tensor | None
    encoding: PageEncoding
    store: Store
    tables: Tensor
    lengths: Tensor


class EncodedDecode:
    """Attention of one query per sequence over the encoded pages of those that have any.

    Page tables are put together once per step; it is valid until pages are encoded.

    Args:
        lives: the plans at work on the sequences, None for exact attention.
    """

    def __init__(self, lives: Sequence[Lifecycle | None]) -> None:
        alike: dict[tuple[PageEncoding, PageFormat], list[tuple[int, Store]]] = {}
        for i, life in enumerate(lives):
            found = None if life is None else stores.readable(life)
            if found is not None:
                store, encoding = found
                first = next(iter(store.formats.values()))
                alike.setdefault((encoding, first), []).append((i, store))
        self._batches = [
            _batch(encoding, found, len(lives)) for (encoding, _), found in alike.items()
        ]

    def __call__(self, layer: int, q: Tensor, state: State, options: LayerOptions) -> State:
        """`state` [n, ...], attention over the rest, merged with that over the encoded pages.

        Args:
            layer: the layer.
            q: [n, q_heads, k_dim], one query per sequence.
            state: replaced where sequences have encoded pages.
            options: how the layer attends.
        """
        for batch in self._batches:
            if layer not in batch.store.formats:
                continue
            rows = batch.store.rows(layer)
            data, format = batch.store.pool(rows).arena.data, batch.store.formats[layer]
            kv = PagedKV(data, format, batch.tables[:, rows], batch.lengths[:, rows])
            state = _added(state, q, kv, batch.encoding, options, batch.index)
        return state


def _batch(encoding: PageEncoding, found: list[tuple[int, Store]], n: int) -> _Batch:
    """The batch of the sequences `found` among `n`, each with its store."""
    tables, lengths = together([store for _, store in found])
    rows = [i for i, _ in found]
    index = None if len(rows) == n else torch.tensor(rows, device=tables.device)
    return _Batch(index, encoding, found[0][1], tables, lengths)


def merged(
    state: State, q: Tensor, kv: PagedKV, encoding: PageEncoding, options: LayerOptions
) -> State:
    """`state` merged with the attention of one query over a sequence's encoded pages."""
    return _added(state, q, kv, encoding, options, None)


def _added(
    state: State,
    q: Tensor,
    kv: PagedKV,
    encoding: PageEncoding,
    options: LayerOptions,
    index: Tensor | None,
) -> State:
    out, lse = state if index is None else (x[index] for x in state)
    own = q if index is None else q[index]
    part = decode_encoded(own, kv, encoding, scale=options.scale, softcap=options.softcap)
    new_out, new_lse = merge_states(out.float(), lse, *part)
    if index is None:
        return new_out.to(out.dtype), new_lse
    return (
        state[0].index_copy(0, index, new_out.to(out.dtype)),
        state[1].index_copy(0, index, new_lse),
    )
