"""API keys, checked before anything else of a request is read."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tamis.server.errors import ApiError


class ApiKeys:
    """Middleware that asks for `Authorization: Bearer KEY`, and notes the key's number as
    `scope["state"]["key"]`.

    Args:
        app: what comes behind it.
        keys: those that are valid; with none of them, everything passes.
        open_paths: paths that need no key, such as those that an orchestrator probes.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: Iterable[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in self._open:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            number = self._number(key.strip().encode("latin-1"))
            if scheme.lower() != "bearer" or number is None:
                error = ApiError(
                    401,
                    "give a valid API key in the header 'Authorization: Bearer KEY'",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
                )
                await error.response()(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = number
        await self._app(scope, receive, send)

    def _number(self, key: bytes) -> int | None:
        """Which of the keys it is; how long that takes does not tell which, or how nearly."""
        found = None
        for number, valid in enumerate(self._keys):
            if hmac.compare_digest(key, valid):
                found = number
        return found
