"""Answers as server-sent events, sent as fast as the client takes them and no faster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tamis.server.connection import ClientGone, unless_gone

DONE = b"data: [DONE]\n\n"


def event(data: str) -> bytes:
    """One event that carries a JSON text."""
    return f"data: {data}\n\n".encode()


def error_event(body: dict[str, Any]) -> bytes:
    """The event that ends a stream which cannot go on."""
    return event(json.dumps(body, ensure_ascii=False))


class EventStream(Response):
    """A response that sends what an iterator yields, until the client goes away.

    While the client does not read, nothing is taken from the iterator; after `timeout_s` of that
    the client is given up.

    Args:
        events: encoded events.
        timeout_s: how long the client may take nothing.
        end: called when the response has ended, one way or the other.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], timeout_s: float, end: Callable[[], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._timeout_s = timeout_s
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for data in self._events:
                async with asyncio.timeout(self._timeout_s):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, write())
        except (ClientGone, TimeoutError):
            pass  # the connection is closed without an end of the response
        finally:
            self._end()
