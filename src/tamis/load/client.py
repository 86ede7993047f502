"""One request after another to a server of OpenAI's API, and what came back when."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from tamis.errors import ConfigError
from tamis.load.workload import Planned, Scale, text

_SHORT, _LONG = 8, 32
"""Words of the two prompts that tell how many tokens a word is."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Times in seconds.

    Attributes:
        at_s: when it was due after the start; the other times count from then on, so that what a
            busy client sends late is not made to look quick.
        prompt_tokens, output_tokens: as the server counts them, or the events that had text.
        ttft_s: until its first text, or its end where it has none; None where neither came.
        tpot_s: mean time between its tokens after the first; None with fewer than two.
        longest_gap_s: the longest time between two events with text.
        total_s: until its end.
        error: why it failed, in a few words; None where it did not.
    """

    at_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    longest_gap_s: float | None = None
    total_s: float = 0.0
    error: str | None = None


class Refused(Exception):  # noqa: N818 - an answer, though not the wanted one
    """The server answered with an error."""


class Client:
    """Asks one server for one model.

    Args:
        http: with the server's base address, such as http://localhost:8000/v1/, and its key.
        model: its name.
        chat: whether to ask /chat/completions instead of /completions.
        extra: more fields of every request.
    """

    def __init__(
        self, http: httpx.AsyncClient, model: str, chat: bool, extra: Mapping[str, Any]
    ) -> None:
        self._http = http
        self._model = model
        self._chat = chat
        self._extra = extra

    async def scale(self) -> Scale:
        """How many tokens a word is to this server, by two short requests.

        Raises:
            ConfigError: the server does not answer them, or does not count tokens.
        """
        counted = []
        for n_words in (_SHORT, _LONG):
            prompt = " ".join(text(Random(0), n_words))
            try:
                response = await self._http.post(self._path, json=self._body(prompt, 1))
                if response.is_error:
                    raise Refused(_reason(response.status_code, response.text))
                counted.append((n_words, int(response.json()["usage"]["prompt_tokens"])))
            except (httpx.HTTPError, Refused) as error:
                raise ConfigError(_silent(self._http, error)) from error
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError("the server does not say how many tokens a prompt has") from error
        return Scale.between(*counted)

    async def ask(self, request: Planned, began: float) -> Outcome:
        """Have a request answered.

        Args:
            began: the time.perf_counter() of the start.
        """
        due = began + request.at_s
        times: list[float] = []
        usage: Mapping[str, int] = {}
        error = None
        try:
            async for event in self._events(request):
                if "error" in event:
                    raise Refused(str(event["error"].get("message", "error"))[:80])
                choices = event.get("choices", ())
                ended = any(choice.get("finish_reason") for choice in choices)
                if any(map(_text, choices)) or (ended and not times):
                    times.append(time.perf_counter() - due)
                usage = event.get("usage") or usage
        except httpx.HTTPError as problem:
            error = type(problem).__name__
        except Refused as problem:
            error = str(problem)
        except ValueError:
            error = "not JSON"
        n_tokens = usage.get("completion_tokens", len(times))
        spread = times[-1] - times[0] if times else 0.0
        return Outcome(
            at_s=request.at_s,
            prompt_tokens=usage.get("prompt_tokens", 0),
            output_tokens=n_tokens,
            ttft_s=times[0] if times else None,
            tpot_s=spread / (n_tokens - 1) if len(times) > 1 and n_tokens > 1 else None,
            longest_gap_s=max((b - a for a, b in itertools.pairwise(times)), default=None),
            total_s=time.perf_counter() - due,
            error=error,
        )

    async def _events(self, request: Planned) -> AsyncIterator[Mapping[str, Any]]:
        """The objects of a streamed answer.

        Raises:
            Refused: the server refuses it, or its answer has no end. httpx.HTTPError: the
            connection failed. ValueError: an event is not JSON.
        """
        body = self._body(request.prompt, request.max_tokens)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", self._path, json=body) as response:
            if response.is_error:
                await response.aread()
                raise Refused(_reason(response.status_code, response.text))
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data and line.startswith("data:"):
                    yield json.loads(data)
        raise Refused("cut off")

    @property
    def _path(self) -> str:
        return "chat/completions" if self._chat else "completions"

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": prompt}
        if self._chat:
            asked = {"messages": [{"role": "user", "content": prompt}]}
        return {"model": self._model, **asked, "max_tokens": max_tokens, **self._extra}


async def first_model(http: httpx.AsyncClient) -> str:
    """The name of the first model that a server lists.

    Raises:
        ConfigError: it lists none.
    """
    try:
        response = await http.get("models")
        if response.is_error:
            raise Refused(_reason(response.status_code, response.text))
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, Refused) as error:
        raise ConfigError(_silent(http, error)) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{http.base_url} lists no model; give --model") from error


def _silent(http: httpx.AsyncClient, error: Exception) -> str:
    return f"{http.base_url} does not answer: {str(error) or type(error).__name__}"


def _text(choice: Mapping[str, Any]) -> str | None:
    """What an event adds to a completion or a message."""
    delta = choice.get("delta")
    return choice.get("text") if delta is None else delta.get("content")


def _reason(status: int, body: str) -> str:
    """A response that is an error, in a few words."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = body.strip().splitlines()[0] if body.strip() else ""
    short = message if len(message) <= 80 else message[:77] + "..."
    return f"HTTP {status}" if status in (429, 503) or not short else f"HTTP {status}: {short}"
