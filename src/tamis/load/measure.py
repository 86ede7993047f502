"""A server measured from end to end: its address in, what its clients saw out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from tamis.errors import ConfigError
from tamis.load.client import Client, first_model
from tamis.load.run import Progress, run
from tamis.load.workload import Workload


@dataclass(frozen=True)
class Target:
    """What is measured.

    Attributes:
        url: everything before /completions.
        model: None is the first that the server lists.
        chat: whether /chat/completions are asked instead of /completions.
        body: more fields of every request.
        timeout_s: a server that is silent for so long has failed.
        api_key: of the requests.

    Raises:
        ConfigError: the address is none.
    """

    url: str
    model: str | None = None
    chat: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 300.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
            fits = url.scheme in ("http", "https") and bool(url.host)
        except httpx.InvalidURL:
            fits = False
        if not fits:
            raise ConfigError(f"{self.url!r} is no address; write http://host:port/v1")


async def measure(
    target: Target,
    workload: Workload,
    most: int | None,
    duration_s: float | None,
    stop: asyncio.Event,
    changed: Callable[[Progress], None],
) -> tuple[Target, Progress]:
    """Send a workload's requests to a server, and wait for their ends.

    Args:
        most: requests at the most; None for no end.
        duration_s: how long requests are sent; None for no end.
        stop: ends it when it is set.
        changed: called when a request was sent or has ended.

    Returns:
        The target with the model that was asked, and what came of it.

    Raises:
        ConfigError: the server does not answer, lists no model, or does not count tokens.
    """
    headers = {} if target.api_key is None else {"Authorization": f"Bearer {target.api_key}"}
    async with httpx.AsyncClient(
        base_url=target.url.rstrip("/") + "/",
        headers=headers,
        timeout=target.timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    ) as http:
        target = replace(target, model=target.model or await first_model(http))
        assert target.model is not None
        client = Client(http, target.model, target.chat, target.body)
        planned = workload.requests(await client.scale())
        if duration_s is not None:
            planned = itertools.takewhile(lambda request: request.at_s <= duration_s, planned)
        return target, await run(client, itertools.islice(planned, most), stop, changed)
