"""Structured logs: one line per event, with what happened and how long it took, and no prompt."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tamis.server.settings import LogFormat

_log = logging.getLogger("tamis.server.access")

GONE = 499
"""The status that is logged where a client went away before it had an answer."""


class Formatter(logging.Formatter):
    """A record as one JSON object, or as one line of text; `fields` of the record come with it."""

    def __init__(self, format: LogFormat) -> None:
        super().__init__()
        self._json = format == "json"

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "time": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(fields, ensure_ascii=False, default=str)
        first = " ".join(str(fields.pop(name)) for name in ("time", "level", "event"))
        del fields["logger"]
        traceback = fields.pop("traceback", None)
        line = " ".join([first, *(f"{name}={value}" for name, value in fields.items())])
        return line if traceback is None else f"{line}\n{traceback}"


def configure(format: LogFormat) -> None:
    """Have this process log to standard error in one of the formats."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(format))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name, level in (("tamis", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True  # `AccessLog` says more
    logging.captureWarnings(True)


class AccessLog:
    """Middleware that logs each request when its response has ended.

    What handlers put into `scope["state"]["log"]`, a dict, is logged too. Responses carry the
    request's id in `X-Request-Id`.

    Args:
        app: what comes behind it.
        responded: called with path and status of every response.
    """

    def __init__(self, app: ASGIApp, responded: Callable[[str, int], None]) -> None:
        self._app = app
        self._responded = responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        fields: dict[str, Any] = {
            "request_id": uuid.uuid4().hex,
            "method": scope["method"],
            "path": scope["path"],
            "status": GONE,
        }
        scope.setdefault("state", {})["log"] = fields

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                identity = (b"x-request-id", fields["request_id"].encode())
                message = {**message, "headers": [*message.get("headers", []), identity]}
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            fields["duration_s"] = round(time.perf_counter() - began, 6)
            route = scope.get("route")
            self._responded(getattr(route, "path", "other"), fields["status"])
            _log.info("request", extra={"fields": fields})
