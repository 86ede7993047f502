"""From what a request says to what the engine is asked for, within the operator's limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tamis.async_llm import AsyncLLM
from tamis.guide import JsonGuide
from tamis.sampling import SamplingParams
from tamis.server.answer import Job
from tamis.server.contexts import Contexts
from tamis.server.errors import ApiError
from tamis.server.protocol import ContextRequest, ResponseFormat, Sampling
from tamis.server.settings import Settings

_GUIDES_KEPT = 64


@dataclass(frozen=True)
class Sender:
    """Who sent a request.

    Attributes:
        user: whose share of the service it takes: the owner of its API key; where there is but one
            key, the `user` that it names.
        owner: whose contexts it may name: the number of its API key; "" where there are no keys.
    """

    user: str
    owner: str


class Jobs:
    """Makes jobs of requests.

    Args:
        llm: that they are for.
        settings: the operator's limits and plans.
        contexts: that requests may name.
    """

    def __init__(self, llm: AsyncLLM, settings: Settings, contexts: Contexts) -> None:
        self._llm = llm
        self._settings = settings
        self._contexts = contexts
        self._guide_of = lru_cache(_GUIDES_KEPT)(self._compile)

    async def generating(
        self, request: Sampling, prompts: list[list[int]], own: Mapping[str, Any], sender: Sender
    ) -> Job:
        """What a request of a generating endpoint asks for.

        Args:
            own: sampling parameters that the endpoint has in a form of its own.
            sender: who asks.

        Raises:
            ApiError, TamisError: a limit is exceeded, or a parameter wrong.
        """
        settings = self._settings
        if not prompts or len(prompts) * (request.n or 1) > settings.max_choices:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n={request.n or 1} completions each; "
                f"there must be from 1 to {settings.max_choices} completions",
                "too_many_completions",
            )
        self._check_length(prompts)
        max_tokens = own["max_tokens"]
        most = settings.max_output_tokens
        if most is not None:
            if max_tokens is not None and max_tokens > most:
                raise ApiError(
                    400,
                    f"max_tokens is {max_tokens}; this server generates at most {most}",
                    "max_tokens_exceeded",
                    "max_tokens",
                )
            max_tokens = max_tokens or most
        given = {
            name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None
        }
        params = SamplingParams(
            **{"temperature": 1.0, **given, **own, "max_tokens": max_tokens},
            logit_bias=_bias(request.logit_bias),
            guide=await self._guide(request.response_format),
        )
        contexts = [self._contexts.find(sender.owner, name) for name in request.contexts or ()]
        names = tuple(kept.name for kept in contexts)
        own_plan = contexts[0].plan if len(contexts) == 1 else self._llm.plan
        return Job(
            prompts,
            params,
            settings.allowed(request.kv_plan, own_plan),
            request.priority,
            sender.user,
            names[0] if len(names) == 1 else names or None,
        )

    def keeping(self, request: ContextRequest, document: list[int], sender: Sender) -> Job:
        """What `POST /v1/contexts` asks for, its document as token ids.

        Raises:
            ApiError, TamisError: it is too long, or its plan is not allowed.
        """
        self._check_length([document])
        plan = self._settings.allowed(request.kv_plan, self._llm.plan)
        return Job([document], SamplingParams(), plan, request.priority, sender.user)

    def _check_length(self, prompts: Sequence[list[int]]) -> None:
        """Refuse prompts that are longer than the operator allows."""
        longest, most = max(map(len, prompts)), self._settings.max_prompt_tokens
        if most is not None and longest > most:
            raise ApiError(
                400,
                f"the prompt has {longest} tokens; this server takes {most}",
                "context_length_exceeded",
            )

    async def _guide(self, wanted: ResponseFormat | None) -> JsonGuide | None:
        """What makes the answer JSON; compiled once for requests with the same schema."""
        if wanted is None or wanted.type == "text":
            return None
        schema: dict[str, Any] | None = None
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise ApiError(400, "json_schema is missing", param="response_format")
            schema = wanted.json_schema.schema_
        return await asyncio.to_thread(
            self._guide_of, None if schema is None else json.dumps(schema)
        )

    def _compile(self, schema: str | None) -> JsonGuide:
        return self._llm.json_guide(None if schema is None else json.loads(schema))


_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "include_stop",
)
"""Fields of a request that are sampling parameters under the same name."""


def _bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    """Token ids, which JSON can only have as strings, as numbers.

    Raises:
        ApiError: one is no number.
    """
    if bias is None:
        return None
    for token_id in bias:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 10):
            raise ApiError(400, f"{token_id[:20]!r} is not a token id", param="logit_bias")
    return {int(token_id): value for token_id, value in bias.items()}
