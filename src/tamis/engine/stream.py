"""What the engine's thread gives to one reader in an asyncio loop, without ever waiting for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from tamis.engine.outputs import Increment
from tamis.errors import EngineError


class RequestStream:
    """The increments of one or several requests, in the order in which they were made.

        async for increment in stream:
            ...

    The engine's thread puts increments in and never waits. So that a reader who does not read
    cannot pile up memory, the stream says when it is `overdue`; whoever puts in then ends the
    requests.

    Args:
        loop: the reader's.
        request_ids: the requests, whose last increments end the stream.
        max_pending: increments that may wait for the reader.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, request_ids: Iterable[str], max_pending: int
    ) -> None:
        self.loop = loop
        self.request_ids: Sequence[str] = tuple(request_ids)
        self._max_pending = max_pending
        self._pending: deque[Increment] = deque()  # appended to by one thread, emptied by another
        self._arrived = asyncio.Event()
        self._open = len(self.request_ids)
        self._failure: str | None = None

    # --- the engine's thread ---------------------------------------------------------------------

    def put(self, increment: Increment) -> None:
        """Add an increment; the reader sees it after the next `wake`."""
        self._pending.append(increment)

    @property
    def overdue(self) -> bool:
        """Whether more increments wait than may."""
        return len(self._pending) > self._max_pending

    def fail(self, reason: str) -> None:
        """End the stream after what is in it; the reader gets an EngineError."""
        self._failure = reason

    # --- the reader's loop -----------------------------------------------------------------------

    def wake(self) -> None:
        """Have the reader look again."""
        self._arrived.set()

    async def batch(self) -> list[Increment]:
        """All increments since the last call, waiting for one; empty when the requests have ended.

        Raises:
            EngineError: the engine ended before the requests did.
        """
        await self._wait()
        batch = [self._pending.popleft() for _ in range(len(self._pending))]
        self._open -= sum(increment.output is not None for increment in batch)
        if not batch and self._open and self._failure is not None:
            raise EngineError(self._failure)
        return batch

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Increment:
        """As `batch`, one increment at a time."""
        await self._wait()
        if self._pending:
            increment = self._pending.popleft()
            self._open -= increment.output is not None
            return increment
        if self._open and self._failure is not None:
            raise EngineError(self._failure)
        raise StopAsyncIteration

    async def _wait(self) -> None:
        """Until there is an increment, or none to come."""
        while not self._pending and self._open and self._failure is None:
            self._arrived.clear()
            if not self._pending and self._failure is None:
                await self._arrived.wait()
