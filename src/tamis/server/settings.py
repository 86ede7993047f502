"""What an operator decides about a server, apart from the model and its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tamis.errors import ConfigError, PlanError
from tamis.plan import Plan

ANY_PLAN = "*"
"""In the list of allowed plans: whatever a request asks for."""

LogFormat = Literal["json", "text"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A server's settings. A wrong value raises `ConfigError` at construction. Times in seconds.

    Attributes:
        name: what requests call the model.
        host, port: where to listen; port 0 takes a free one.
        api_keys: requests must bring one of them; none are asked for where it is empty.
        allow_plans: plans that requests may ask for, beside the server's own; "*" allows any.
        max_body: bytes of a request's body at the most.
        max_prompt_tokens, max_output_tokens: of one prompt, and of one completion; None leaves it
            to the model's context.
        context_memory: bytes that the pages of contexts (`POST /v1/contexts`) may take; None is a
            half of the KV memory.
        max_choices: completions of one request (prompts times `n`) at the most.
        max_requests: requests that are worked on or wait at once; more are refused with 429.
        max_wait: the longest that a request's first token may be expected to take; what would wait
            for longer is refused with 429. None is what is left of the request's timeout.
        request_timeout: until a request must have ended.
        body_timeout: until a request's body must have come.
        write_timeout: a client that takes nothing for so long is cut off.
        drain_timeout: what requests get to end after SIGTERM.
        cors_origins: web pages that may call the server from a browser.
        log_format: one JSON object or one line of text per event.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allow_plans: tuple[str, ...] = ()
    max_body: int = 8 << 20
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    context_memory: int | None = None
    max_choices: int = 64
    max_requests: int = 512
    max_wait: float | None = None
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    drain_timeout: float = 30.0
    cors_origins: tuple[str, ...] = ()
    log_format: LogFormat = "json"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535")
        for name in ("max_prompt_tokens", "max_output_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in (
            "max_body",
            "max_choices",
            "max_requests",
            "request_timeout",
            "body_timeout",
            "write_timeout",
            "drain_timeout",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.context_memory is not None and self.context_memory < 0:
            raise ConfigError(f"context_memory is {self.context_memory}; it must be at least 0")
        if self.max_wait is not None and not self.max_wait > 0:
            raise ConfigError(f"max_wait is {self.max_wait}; it must be more than 0")
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise ConfigError("an API key is empty or not ASCII; give keys of ASCII characters")
        if self.log_format not in ("json", "text"):
            raise ConfigError(f"log_format is {self.log_format!r}; it must be 'json' or 'text'")
        for plan in self.allow_plans:
            if plan != ANY_PLAN:
                Plan.parse(plan)

    def allowed(self, text: str | None, own: Plan) -> Plan:
        """The plan of a request that asks for `text`, on a server whose own plan is `own`.

        Raises:
            PlanError: it is no plan, or the operator has not allowed it.
        """
        if text is None:
            return own
        plan = Plan.parse(text)
        if ANY_PLAN in self.allow_plans:
            return plan
        plans = [own, *map(Plan.parse, self.allow_plans)]
        if plan not in plans:
            names = ", ".join(repr(str(allowed)) for allowed in dict.fromkeys(plans))
            raise PlanError(f"this server does not allow the plan {text!r}; it allows {names}")
        return plan
