"""A device's streams, of which all but the current one do their work as late as they may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WRITES = (torch.ops.aten.copy_.default, torch.ops.aten.index_put_.default)


class LateStream:
    """Writes that wait until somebody waits for them.

    Attributes:
        n_writes: how many there were.
    """

    def __init__(self) -> None:
        self.n_writes = 0
        self.has_waited = False
        self._work: list[Callable[[], object]] = []
        self._n_done = 0

    def add(self, write: Callable[[], object]) -> None:
        self.n_writes += 1
        self._work.append(write)

    def run(self, until: int) -> None:
        """Do the work that is not done, up to so many writes from the beginning."""
        while self._n_done < until:
            self._work[self._n_done]()
            self._n_done += 1

    @property
    def n_pending(self) -> int:
        return self.n_writes - self._n_done

    def wait_stream(self, other: LateStream) -> None:
        other.run(other.n_writes)
        self.has_waited = True


class LateEvent:
    """Work of a stream up to where it was recorded."""

    def __init__(self) -> None:
        self._at: tuple[LateStream, int] | None = None

    def record(self, stream: LateStream) -> None:
        self._at = stream, stream.n_writes

    def wait(self, stream: LateStream) -> None:
        if self._at is not None and self._at[0] is not stream:
            self._at[0].run(self._at[1])


class LateStreams:
    """In place of `torch.cpu`, for `Transfers`: the current stream does all work at once, the other
    ones when the current one waits for them. Whoever reads too early reads what was there before;
    whoever writes too early is overwritten. Every use of another stream must first have waited for
    the current one, whose work would still be under way on a GPU.

    Attributes:
        side: the stream that was made last.
    """

    Event = LateEvent

    def __init__(self) -> None:
        self.side = LateStream()
        self._current = LateStream()

    def Stream(self, device: torch.device) -> LateStream:  # noqa: N802 - as torch calls it
        self.side = LateStream()
        return self.side

    def current_stream(self, device: torch.device) -> LateStream:
        return self._current

    @contextmanager
    def stream(self, stream: LateStream) -> Iterator[None]:
        assert stream.has_waited
        stream.has_waited = False
        with _Postponed(stream):
            yield

    def synchronize(self) -> None:
        self.side.run(self.side.n_writes)


class _Postponed(TorchDispatchMode):
    """Gives writes to a stream."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in WRITES:
            assert not func._schema.is_mutable, f"{func} writes at once"
            return func(*args, **(kwargs or {}))
        self._stream.add(lambda: func(*args, **(kwargs or {})))
        return args[0]
