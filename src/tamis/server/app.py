"""The server's routes."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from tamis import __version__
from tamis.async_llm import AsyncLLM
from tamis.server import dashboard, errors
from tamis.server.body import BodyLimit
from tamis.server.errors import ApiError
from tamis.server.keys import ApiKeys
from tamis.server.logs import AccessLog
from tamis.server.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ContextCard,
    ContextDeleted,
    ContextList,
    ContextRequest,
    ErrorBody,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from tamis.server.service import Service
from tamis.server.settings import Settings

OPEN_PATHS = ("/health", "/ready", dashboard.PATH)
"""Paths that need no API key: they say nothing but yes or no, or are the same for everyone."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 409, 413, 429, 500, 503, 504)
}


def create_app(llm: AsyncLLM, settings: Settings) -> FastAPI:
    """The ASGI application that serves one model; `app.state.service` is what it works with.

    Raises:
        RequestError: the model has no tokenizer. ConfigError: the grammar library is missing.
    """
    service = Service(llm, settings)
    # The pages of documentation would load scripts from elsewhere; /openapi.json needs none.
    app = FastAPI(title="tamis", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    _generating(app, service)
    _keeping(app, service)
    _describing(app, service)
    _operating(app, service)
    dashboard.install(app, service)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body, timeout_s=settings.body_timeout)
    app.add_middleware(ApiKeys, keys=settings.api_keys, open_paths=OPEN_PATHS)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(AccessLog, responded=service.metrics.responded)
    return app


def _generating(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """How texts go on."""
        sender = service.sender_of(request, body.user)
        return await service.answer(request, body.stream, lambda: service.complete(body, sender))

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The next message of a conversation."""
        sender = service.sender_of(request, body.user)
        return await service.answer(request, body.stream, lambda: service.chat(body, sender))

    @app.post("/v1/embeddings", responses=_ERRORS)
    async def embeddings(body: Annotated[Any, Body()] = None) -> Response:
        """Refused: a model that generates text has no embeddings to give."""
        raise ApiError(
            400,
            "this server generates text and makes no embeddings; use an embedding model's server",
            "embeddings_not_supported",
        )


def _keeping(app: FastAPI, service: Service) -> None:
    contexts = service.contexts

    @app.post("/v1/contexts", responses=_ERRORS)
    async def add_context(body: ContextRequest, request: Request) -> ContextCard:
        """A document whose KV is computed once, for requests that name it in `contexts`."""
        return await service.keep(request, body)

    @app.get("/v1/contexts", responses=_ERRORS)
    async def list_contexts(request: Request) -> ContextList:
        """The contexts of the API key that asks."""
        owner = service.sender_of(request).owner
        return ContextList(data=[service.card(kept) for kept in contexts.of(owner)])

    @app.get("/v1/contexts/{context_id}", responses=_ERRORS)
    async def context(context_id: str, request: Request) -> ContextCard:
        """One of them."""
        return service.card(contexts.find(service.sender_of(request).owner, context_id))

    @app.delete("/v1/contexts/{context_id}", responses=_ERRORS)
    async def delete_context(context_id: str, request: Request) -> ContextDeleted:
        """Free its pages, when the last request that goes on from it has ended."""
        await contexts.delete(service.sender_of(request).owner, context_id)
        return ContextDeleted(id=context_id)


def _describing(app: FastAPI, service: Service) -> None:
    card = ModelCard(
        id=service.settings.name,
        created=int(time.time()),
        max_model_len=service.max_model_len,
        kv_plan=str(service.llm.plan),
    )

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> ModelCard:
        """The same by its name."""
        service.check_model(name)
        return card

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """The token ids of a text, or of a conversation in the model's template."""
        if body.model is not None:
            service.check_model(body.model)
        tokens = await service.tokenize(body)
        return TokenizeResponse(
            tokens=tokens, count=len(tokens), max_model_len=service.max_model_len
        )


def _operating(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=_ERRORS)
    async def health() -> dict[str, str]:
        """Whether the engine runs; if not, restart the server."""
        if not service.llm.alive:
            raise ApiError(503, "the engine has ended; restart the server", "engine_ended")
        return {"status": "ok"}

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> dict[str, str]:
        """Whether a request sent now would be taken in."""
        admission = service.admission
        if not service.llm.alive or admission.draining or admission.full:
            raise ApiError(503, "not ready for requests now", "not_ready")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
