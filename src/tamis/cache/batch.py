"""A step's batch as the attention callback sees it: tables and lengths of all its sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tamis.cache import moves
from tamis.cache.format import PagedKV
from tamis.cache.paged import PagedCache
from tamis.cache.pool import IntArray, PageError
from tamis.cache.sequence import SequenceCache


class BatchView:
    """The page tables of a batch, put together once per step and sliced per layer.

    It is valid from the sequences' `reserve` to their `advance`. Sequences may have different
    side columns; attention sees the keys, values and positions of all of them. A layer for which
    a sequence has not reserved the tokens can be read, but not appended to.

    Attributes:
        layout: of the cache, without side columns.
        tables: page ids in host memory, int32 [n, rows, pages]; lengths: tokens, those of the step
            counted, int32 [n, rows].
        starts: sequence `i` adds the tokens starts[i] .. starts[i + 1] - 1 of the step,
            int64 [n + 1].
        positions: absolute positions of the step's tokens, int32 [tokens].
    """

    def __init__(
        self,
        cache: PagedCache,
        sequences: Sequence[SequenceCache],
        new_tokens: Sequence[int],
        positions: torch.Tensor,
        in_place: Sequence[bool] | None = None,
    ) -> None:
        """Gather the tables.

        Args:
            cache: the cache of all the sequences.
            sequences: the batch, in the order of the step's tokens.
            new_tokens: how many tokens each sequence adds; they must be reserved in the layers
                that `append` is called for.
            positions: absolute positions of those tokens, int32 [sum of new_tokens], on the
                cache's device.
            in_place: which sequences hold the tokens already, each as the token whose index is its
                position: they are written there, and add none. None is none of them.
        """
        in_place = in_place or [False] * len(sequences)
        added = [0 if there else n for n, there in zip(new_tokens, in_place, strict=True)]
        for sequence, there in zip(sequences, in_place, strict=True):
            if there:
                sequence.tier.changing(*sequence.held())
        self._lacking: dict[int, tuple[int, int]] = {}  # layer: tokens added, tokens reserved
        for sequence, n in zip(sequences, added, strict=True):
            if n > sequence.room:
                rooms = enumerate(sequence.layer_room().tolist())
                self._lacking |= {layer: (n, room) for layer, room in rooms if room < n}
        width = max(sequence.width for sequence in sequences)
        shape = (len(sequences), cache.layout.n_rows)
        tables = np.zeros((*shape, width), dtype=np.int32)
        lengths = np.empty((2, *shape), dtype=np.int32)
        gather_tables(sequences, tables, lengths[0])
        counts = np.array(new_tokens, dtype=np.int32)
        np.add(lengths[0], np.array(added, dtype=np.int32)[:, None], out=lengths[1])
        starts = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        self._data = cache.arena.data
        self.layout = cache.layout
        self.tables, self.lengths = tables, lengths[1]
        device = self.device
        self._tables = torch.from_numpy(tables).to(device)
        self._before, self._after = torch.from_numpy(lengths).to(device)
        self.starts = torch.from_numpy(starts).to(device)
        self.positions = positions
        self._groups = _groups(in_place)
        self._ends = starts.tolist()

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._data.device

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the step's keys and values of one layer into the pages.

        Args:
            layer: the layer.
            k: [tokens, kv_heads, k_dim] in the cache's dtype.
            v: [tokens, kv_heads, v_dim] in the cache's dtype.

        Raises:
            PageError: a sequence adds more tokens than it has reserved in this layer.
        """
        if layer in self._lacking:
            n, room = self._lacking[layer]
            raise PageError(f"a batch adds {n} tokens to a sequence with {room} reserved")
        for group, there in self._groups:
            self._write(layer, k, v, group, there)

    def _write(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, group: slice, there: bool
    ) -> None:
        """`append` for some consecutive sequences, or for one whose tokens are `there`."""
        rows = self.layout.rows(layer)
        tables, lengths = self._tables[group, rows], self._before[group, rows]
        own = slice(self._ends[group.start], self._ends[group.stop])
        at = self.positions[own]
        starts = self.starts[group.start : group.stop + 1] - own.start
        if there:  # each token as a sequence of its own, of so many tokens as precede it
            tables = tables.expand(len(at), -1, -1)
            lengths = at[:, None].expand(-1, tables.shape[1])
            starts = torch.arange(len(at) + 1, device=at.device)
        moves.append(
            self._data,
            self.layout.formats[self.layout.layer_formats[layer]],
            tables,
            lengths,
            starts,
            k[own],
            v[own],
            at,
        )

    def pages(self, layer: int, start: int, stop: int, *, with_new: bool) -> PagedKV:
        """The pages of sequences `start` .. `stop` - 1 at one layer.

        Args:
            layer: the layer.
            start, stop: which sequences of the batch.
            with_new: whether the lengths count the step's own tokens.
        """
        rows = self.layout.rows(layer)
        lengths = self._after if with_new else self._before
        return PagedKV(
            self._data,
            self.layout.formats[self.layout.layer_formats[layer]],
            self._tables[start:stop, rows],
            lengths[start:stop, rows],
        )


def gather_tables(sequences: Sequence[SequenceCache], tables: IntArray, lengths: IntArray) -> None:
    """Copy the page tables and lengths of some sequences to the first rows of `tables` [n, rows,
    width] and `lengths` [n, rows]; entries past a sequence's last page stay as they are."""
    for i, sequence in enumerate(sequences):
        tables[i, :, : sequence.width] = sequence.tables[:, : sequence.width]
        lengths[i] = sequence.lengths


def _groups(in_place: Sequence[bool]) -> list[tuple[slice, bool]]:
    """Consecutive sequences that are written at once: those that hold their tokens already one by
    one, and runs of the others."""
    groups: list[tuple[slice, bool]] = []
    for i, there in enumerate(in_place):
        if groups and not there and not groups[-1][1]:
            groups[-1] = (slice(groups[-1][0].start, i + 1), False)
        else:
            groups.append((slice(i, i + 1), there))
    return groups
