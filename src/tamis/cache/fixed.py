"""A decode step's batch in memory that stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from tamis.cache import moves
from tamis.cache.batch import gather_tables
from tamis.cache.format import PagedKV
from tamis.cache.paged import PagedCache
from tamis.cache.pool import IntArray
from tamis.cache.sequence import SequenceCache
from tamis.cache.store import Store


class FixedBatch:
    """What differs from one decode step to the next, at fixed addresses.

    Kernels that were recorded over it once run again for other sequences. Each sequence adds one
    token; rows beyond those of the step's sequences are empty: their tokens are written nowhere and
    they see nothing. It is valid from the sequences' `reserve` to their `advance`.

    Attributes:
        layout: of the cache, without side columns.
        rows, width: the most sequences, and the most pages of any of their heads.
        tokens, positions: what the sequences add, on the device, int32 [rows]; 0 in empty rows.
    """

    def __init__(self, cache: PagedCache, rows: int, width: int) -> None:
        """Reserve the memory: on the device, and as much on the host from where it is filled."""
        self.layout = cache.layout
        self.rows, self.width = rows, width
        self._data = cache.arena.data
        device = self._data.device
        shapes = _shapes(rows, self.layout.n_rows, width)
        size = sum(map(prod, shapes))
        self._sent = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._received = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = _Step(*_split(self._sent, shapes))
        self._step = _Step(*_split(self._received, shapes))
        self.tokens, self.positions = self._step.tokens, self._step.positions

    @property
    def tables(self) -> IntArray:
        """Page ids in host memory, int32 [rows, rows of the cache, width]."""
        tables: IntArray = self._host.tables.numpy()
        return tables

    @property
    def lengths(self) -> IntArray:
        """Tokens in host memory, those of the step counted, int32 [rows, rows of the cache]."""
        lengths: IntArray = self._host.after.numpy()
        return lengths

    def fill(
        self, sequences: Sequence[SequenceCache], tokens: Sequence[int], positions: Sequence[int]
    ) -> None:
        """Take a step's sequences in, in host memory.

        Args:
            sequences: at most `rows`, each with room for a token and of `width` pages at most.
            tokens, positions: the id and the absolute position of the token that each adds.
        """
        n, host = len(sequences), self._host
        before = host.before.numpy()
        gather_tables(sequences, self.tables, before)
        before[n:] = 0
        self.lengths[:] = before
        self.lengths[:n] += 1
        for fixed, values in ((host.tokens, tokens), (host.positions, positions)):
            fixed.zero_()
            fixed[:n] = torch.tensor(values, dtype=torch.int32)
        torch.arange(self.rows + 1, out=host.starts).clamp_(max=n)

    def send(self) -> None:
        """Copy what was filled in to the device, all at once."""
        self._received.copy_(self._sent)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the sequences' keys and values of one layer into the pages.

        Args:
            layer: the layer.
            k: [rows, kv_heads, k_dim] in the cache's dtype; v: [rows, kv_heads, v_dim].
        """
        rows, step = self.layout.rows(layer), self._step
        format = self.layout.formats[self.layout.layer_formats[layer]]
        tables, before = step.tables[:, rows], step.before[:, rows]
        moves.append(self._data, format, tables, before, step.starts, k, v, step.positions)

    def pages(self, layer: int) -> PagedKV:
        """The pages of all rows at one layer, the step's own tokens among them."""
        rows = self.layout.rows(layer)
        format = self.layout.formats[self.layout.layer_formats[layer]]
        return PagedKV(self._data, format, self._step.tables[:, rows], self._step.after[:, rows])


class FixedStores:
    """The pages of sequences' stores that cover the same layers (`together`), at fixed addresses.

    Args:
        like: a store that covers these layers, in the formats of all.
        rows, width: the most sequences, and the most pages of any of their heads.
    """

    def __init__(self, like: Store, rows: int, width: int) -> None:
        self._data = like.tier.arena.data
        self._layers = {layer: (format, like.rows(layer)) for layer, format in like.formats.items()}
        n_rows, device = like.lengths.size, self._data.device
        shapes: list[tuple[int, ...]] = [(rows, n_rows, width), (rows, n_rows)]
        size = sum(map(prod, shapes))
        self._sent = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._received = torch.zeros(size, dtype=torch.int32, device=device)
        self._from_tables, self._from_lengths = _split(self._sent, shapes)
        self._tables, self._lengths = _split(self._received, shapes)

    def fill(self, stores: Sequence[Store | None]) -> None:
        """Take the stores of a step's sequences in, None for those without; and send them."""
        tables, lengths = self._from_tables.numpy(), self._from_lengths.numpy()
        lengths[:] = 0
        for i, store in enumerate(stores):
            if store is not None:
                own = store.tables[:, : tables.shape[2]]
                tables[i, :, : own.shape[1]] = own
                lengths[i] = store.lengths
        self._received.copy_(self._sent)

    def pages(self, layer: int) -> PagedKV | None:
        """The pages of all rows at one layer; None if the stores do not cover it."""
        if layer not in self._layers:
            return None
        format, rows = self._layers[layer]
        return PagedKV(self._data, format, self._tables[:, rows], self._lengths[:, rows])


class _Step(NamedTuple):
    """Parts of one run of memory, int32: page ids [rows, cache rows, width]; tokens of each cache
    row before and after the step; the tokens added, [rows]; and where each row's begins,
    [rows + 1]."""

    tables: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor


def _shapes(rows: int, n_rows: int, width: int) -> list[tuple[int, ...]]:
    """The shapes of the parts of a `_Step`."""
    return [(rows, n_rows, width), (rows, n_rows), (rows, n_rows), (rows,), (rows,), (rows + 1,)]


def _split(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views of these shapes, one after another."""
    parts = torch.split(flat, [prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
