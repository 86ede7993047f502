"""Errors as clients of OpenAI's API expect them: a status, and a JSON object that explains it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tamis.errors import EngineError, KVMemoryError, OverloadError, PlanError, TamisError

_log = logging.getLogger(__name__)

RETRY_S = 1
"""Seconds after which to try again when nothing better is known."""


class ApiError(Exception):
    """An answer that is not the one that was asked for.

    Args:
        status: of HTTP.
        message: a sentence for the client's user.
        code: a short name for programs.
        param: the field of the request that is wrong.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def explain(error: TamisError) -> ApiError:
    """The answer to a request that the engine refused."""
    message = str(error)
    if isinstance(error, OverloadError):
        wait = {"Retry-After": str(max(RETRY_S, math.ceil(error.retry_s)))}
        return ApiError(429, message, "overloaded", headers=wait)
    if isinstance(error, EngineError):
        return ApiError(503, message, "engine_ended", headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, PlanError):
        return ApiError(400, message, "invalid_plan", "kv_plan")
    if isinstance(error, KVMemoryError):
        return ApiError(400, message, "kv_memory_exceeded")
    return ApiError(400, message, "invalid_request")


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The answer to a body that does not have the form of a request.

    Args:
        errors: pydantic's. What was given is not repeated: it may be a prompt.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        where = first["loc"][-1]
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, f"the body is not JSON: {reason} (at {where})", "invalid_json")
    if first["loc"] == ("body",) and first["type"] != "missing":
        message = "the body must be a JSON object, sent with 'Content-Type: application/json'"
        return ApiError(400, message, "invalid_json")
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    # A union reports what each of its members thinks of the value.
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    message = f"{place or 'the body'}: {first['msg']}{more}"
    return ApiError(400, message, "invalid_request", place or None)


def install(app: FastAPI) -> None:
    """Have every error of an app answered in this form."""

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(TamisError)
    async def of_tamis(request: Request, error: TamisError) -> JSONResponse:
        return explain(error).response()

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        phrase = HTTPStatus(error.status_code).phrase.lower()
        message = f"{request.method} {request.url.path}: {phrase}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def of_anything(request: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed; its log says why", "internal_error").response()
