"""The dashboard: one page that asks this server, and nobody else, what it does."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from fastapi import FastAPI, Request
from starlette.responses import Response

from tamis import __version__, pages
from tamis.server.protocol import ContextCard, ErrorBody
from tamis.server.recent import Ended, Latencies
from tamis.server.service import Service
from tamis.server.settings import ANY_PLAN
from tamis.server.state import EngineState, engine_state

PATH = "/"
"""Of the page. It holds nothing of the server, so it needs no key; what it asks for does."""

_ENDED_SHOWN = 20


@dataclass(frozen=True)
class About:
    """What does not change while the server runs; `plans` are those that requests may ask for."""

    model: str
    version: str
    plan: str
    plans: list[str]
    any_plan: bool
    chat: bool
    max_model_len: int
    max_requests: int


@dataclass(frozen=True)
class ContextsState:
    """How many contexts there are, the bytes that they may take, and those of who asks."""

    number: int
    most_bytes: int
    own: list[ContextCard]


@dataclass(frozen=True)
class DashboardState:
    """All that the page shows."""

    about: About
    open_requests: int
    draining: bool
    engine: EngineState
    latencies: Latencies
    contexts: ContextsState
    ended: list[Ended]


def install(app: FastAPI, service: Service) -> None:
    """Serve the page and what it asks for."""
    page, headers = render()
    about = _about(service)

    @app.get(PATH, include_in_schema=False)
    async def dashboard() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    @app.get("/dashboard/state", responses={401: {"model": ErrorBody}, 503: {"model": ErrorBody}})
    async def state(request: Request) -> DashboardState:
        """What the server does now: pages, queue, latencies, and requests without their texts."""
        contexts = service.contexts
        own = contexts.of(service.sender_of(request).owner)
        return DashboardState(
            about,
            service.admission.n_open,
            service.admission.draining,
            await service.llm.read(engine_state),
            service.recent.latencies(),
            ContextsState(len(contexts), contexts.most_bytes, [service.card(kept) for kept in own]),
            service.recent.newest(_ENDED_SHOWN),
        )


def render() -> tuple[str, dict[str, str]]:
    """The page, and the headers that let it run its own script and ask its own server alone."""
    templates = pages.environment("tamis.server")
    style, script = (
        templates.get_template(name).render() for name in ("dashboard.css", "dashboard.js")
    )
    page = templates.get_template("dashboard.html.j2").render(style=style, script=script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return page, headers


def _hash(text: str) -> str:
    """What names an inline script or style in a policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _about(service: Service) -> About:
    llm, settings = service.llm, service.settings
    own = str(llm.plan)
    allowed = [plan for plan in settings.allow_plans if plan != ANY_PLAN]
    return About(
        model=settings.name,
        version=__version__,
        plan=own,
        plans=list(dict.fromkeys([own, *allowed])),
        any_plan=ANY_PLAN in settings.allow_plans,
        chat=llm.has_chat_template,
        max_model_len=service.max_model_len,
        max_requests=settings.max_requests,
    )
