"""The bodies of requests: read whole before a request is looked at, within bounds."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tamis.server.errors import ApiError

_LINGER_S = 1.0
"""How long what still comes of a refused body is thrown away, so that the client, which may read
only after it has sent everything, gets to see why it was refused."""


class BodyLimit:
    """Middleware that refuses a body while it is being read, once it is too large or too slow.

    Args:
        app: what comes behind it; it finds the body complete.
        max_bytes: the most that is read.
        timeout_s: until a body must be complete.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            message = f"the body did not come within {self._timeout_s:g} s"
            await _refuse(ApiError(408, message, "body_timeout"), receive, send)
        except ApiError as error:
            await _refuse(error, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client went away.

        Raises:
            ApiError: it is too large.
        """
        stated = Headers(scope=scope).get("content-length", "0")
        too_large = ApiError(
            413, f"the body is larger than {self._max_bytes} bytes, the most", "body_too_large"
        )
        if stated.isdecimal() and int(stated) > self._max_bytes:
            raise too_large
        parts: list[bytes] = []
        n_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            n_bytes += len(parts[-1])
            if n_bytes > self._max_bytes:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What gives the body once, and then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer, throw away what still comes for a moment, and end the connection."""
    response = error.response()
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER_S):
            message = await receive()
            while message["type"] == "http.request" and message.get("more_body", False):
                message = await receive()
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
