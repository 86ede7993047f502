"""Copies of pages between a device and host memory, beside what the device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from tamis.cache.format import UNIT
from tamis.cache.pool import IntArray, PagePool

_PIECE_BYTES = 1 << 26
_WORD = 8


class _Buffer(NamedTuple):
    """Device memory that pages pass through.

    Attributes:
        words: int64 [n].
        done: when the side stream has copied what was last sent through it.
    """

    words: torch.Tensor
    done: Any


class Transfers:
    """A side stream of a device, on which pages go to host memory and come from it.

    The *computing stream* is the one that is current when a method is called. The host waits for no
    copy of pages (but for the computing stream, when it sends their ids). What keeps the two
    streams from disturbing each other:

    - Pages that go (`send`) are gathered into a buffer by the computing stream, so they may be
      written again by whatever it is given next. The side stream copies the buffer.
    - Pages that come (`bring`) are written by the side stream, after all that the computing stream
      was given before; it waits for them at the next `arrive`.
    - The host memory that pages were sent to is touched by the side stream alone, in the order of
      the calls: it may be brought back from, freed and sent to at once. Who reads it on the host
      must synchronize with the device before.
    - What is brought for reading only (`ahead`) goes to two buffers in turns.

    Copies run beside the device's work where host memory is pinned. On the CPU, where torch's
    streams do nothing, the same calls are copies made at once, of which there are more than
    `PagePool.copy_from` makes: for tests.

    Args:
        device: whose pages.
        staging_bytes: for the buffers, on the device, that pages which go and come pass through,
            at least twice the largest page. Where more goes at once, the computing stream waits
            until all but so many bytes are copied.
        streams: torch's module for the device's streams, by default that of its type.
    """

    def __init__(self, device: torch.device, staging_bytes: int, streams: Any = None) -> None:
        self._device = device
        self._streams = torch.get_device_module(device) if streams is None else streams
        self._side = self._streams.Stream(device)
        n_buffers = max(2, staging_bytes // _PIECE_BYTES)
        shape = (n_buffers, staging_bytes // n_buffers // _WORD)
        staging = torch.empty(shape, dtype=torch.int64, device=device)
        self._buffers = [_Buffer(words, self._streams.Event()) for words in staging]
        self._arriving: list[tuple[Any, torch.Tensor]] = []
        self._ahead = [staging.new_empty(0), staging.new_empty(0)]

    def send(self, pool: PagePool, ids: IntArray, host: PagePool, copies: IntArray) -> None:
        """Copy pages of the device to pages of host memory, int32 [n] each, of one format."""
        self.arrive()  # what is sent may have been brought, and through the same buffers
        order = np.argsort(copies)  # so that more of them follow one another
        index, copies = self._index(ids[order]), copies[order]
        words, compute = pool.words(), self._compute
        for piece in self._pieces(copies.size, pool):
            staged, done = self._staged(pool, copies[piece].size)
            done.wait(compute)
            torch.index_select(words, 0, index[piece], out=staged)
            self._side.wait_stream(compute)
            with self._streams.stream(self._side):
                for run, there in _runs(host, copies[piece]):
                    there.copy_(staged[run], non_blocking=True)
                done.record(self._side)

    def bring(self, host: PagePool, copies: IntArray, pool: PagePool, ids: IntArray) -> None:
        """Copy pages of host memory to pages of the device, int32 [n] each, of one format, which
        nothing but this class may read or write before `arrive`."""
        order = np.argsort(copies)
        index, copies = self._index(ids[order]), copies[order]
        words, arrived = pool.words(), self._streams.Event()
        self._side.wait_stream(self._compute)
        with self._streams.stream(self._side):
            for piece in self._pieces(copies.size, pool):
                staged, _ = self._staged(pool, copies[piece].size)
                fetch(host, copies[piece], staged)
                words[index[piece]] = staged
            arrived.record(self._side)
        # The index is the computing stream's memory, to be freed when that has waited.
        self._arriving.append((arrived, index))

    def arrive(self) -> None:
        """Have the computing stream wait for all pages that have been brought so far."""
        for arrived, _ in self._arriving:
            arrived.wait(self._compute)
        self._arriving.clear()

    def ahead(self, host: PagePool, ids: IntArray) -> Callable[[], torch.Tensor]:
        """Begin to bring pages of host memory, int32 [n], one after the other to a buffer.

        The buffer is that of the call before the last, so the computing stream must have been
        given all that reads what that one brought.

        Returns:
            What has the computing stream wait for them, and gives their bytes, uint8
            [n * page_bytes] on the device.
        """
        n_words = ids.size * host.page_bytes // _WORD
        buffer = self._ahead.pop(0)
        if buffer.numel() < n_words:
            self._compute.wait_stream(self._side)  # it may be writing to what is freed here
            buffer = torch.empty(n_words, dtype=torch.int64, device=self._device)
        self._ahead.append(buffer)
        words, arrived = buffer[:n_words], self._streams.Event()
        self._side.wait_stream(self._compute)
        with self._streams.stream(self._side):
            fetch(host, ids, words.view(ids.size, -1))
            arrived.record(self._side)

        def wait() -> torch.Tensor:
            arrived.wait(self._compute)
            return words.view(torch.uint8)

        return wait

    @property
    def _compute(self) -> Any:
        return self._streams.current_stream(self._device)

    def _index(self, ids: IntArray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._device)

    def _pieces(self, n: int, pool: PagePool) -> Iterator[slice]:
        """Cut 0 .. n - 1 into runs of pages that a buffer holds."""
        size = self._buffers[0].words.nbytes // pool.page_bytes
        return (slice(start, start + size) for start in range(0, n, size))

    def _staged(self, pool: PagePool, n_pages: int) -> _Buffer:
        """The buffer whose turn it is, as the words of some pages, int64 [n_pages, words]."""
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        width = pool.page_bytes // _WORD
        return _Buffer(buffer.words[: n_pages * width].view(n_pages, width), buffer.done)


def fetch(host: PagePool, ids: IntArray, out: torch.Tensor) -> None:
    """Copy pages of host memory, int32 [n], to `out`, int64 [n, page_bytes / 8], in the current
    stream of its device."""
    for run, pages in _runs(host, ids):
        out[run].copy_(pages, non_blocking=True)


def _runs(pool: PagePool, ids: IntArray) -> Iterator[tuple[slice, torch.Tensor]]:
    """Pages that follow one another in memory: where they stand among the ids, int32 [n], and
    their words, int64 [pages, page_bytes / 8]."""
    words, width = pool.arena.data.view(torch.int64), pool.page_bytes // _WORD
    ends = np.flatnonzero(np.diff(ids) != pool.page_bytes // UNIT) + 1
    for start, stop in pairwise([0, *ends.tolist(), ids.size] if ids.size else []):
        first = int(ids[start]) * (UNIT // _WORD)
        yield slice(start, stop), words[first : first + (stop - start) * width].view(-1, width)
