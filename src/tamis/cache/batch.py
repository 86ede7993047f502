"""A step's batch as the attention callback sees it: tables and lengths of all its sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tamis.cache import moves
from tamis.cache.format import PagedKV
from tamis.cache.paged import PagedCache
from tamis.cache.pool import PageError
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
    ) -> None:
        """Gather the tables.

        Args:
            cache: the cache of all the sequences.
            sequences: the batch, in the order of the step's tokens.
            new_tokens: how many tokens each sequence adds; they must be reserved in the layers
                that `append` is called for.
            positions: absolute positions of those tokens, int32 [sum of new_tokens], on the
                cache's device.
        """
        self._lacking: dict[int, tuple[int, int]] = {}  # layer: tokens added, tokens reserved
        for sequence, n in zip(sequences, new_tokens, strict=True):
            if n > sequence.room:
                rooms = enumerate(sequence.layer_room().tolist())
                self._lacking |= {layer: (n, room) for layer, room in rooms if room < n}
        width = max(sequence.width for sequence in sequences)
        shape = (len(sequences), cache.layout.n_rows)
        tables = np.zeros((*shape, width), dtype=np.int32)
        lengths = np.empty((2, *shape), dtype=np.int32)
        for i, sequence in enumerate(sequences):
            tables[i, :, : sequence.width] = sequence.tables[:, : sequence.width]
            lengths[0, i] = sequence.lengths
        counts = np.array(new_tokens, dtype=np.int32)
        np.add(lengths[0], counts[:, None], out=lengths[1])
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
        rows = self.layout.rows(layer)
        moves.append(
            self._data,
            self.layout.formats[self.layout.layer_formats[layer]],
            self._tables[:, rows],
            self._before[:, rows],
            self.starts,
            k,
            v,
            self.positions,
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
