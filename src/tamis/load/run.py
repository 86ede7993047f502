"""Requests sent when they are due, however long the others take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tamis.load.client import Client, Outcome
from tamis.load.workload import Planned


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        sent: requests, of which `outcomes` have ended.
        unfinished: those that were given up because the run was stopped.
        elapsed_s: from the start to the end of the last request, or until now.
    """

    sent: int = 0
    unfinished: int = 0
    elapsed_s: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)


async def run(
    client: Client,
    requests: Iterable[Planned],
    stop: asyncio.Event,
    changed: Callable[[Progress], None],
) -> Progress:
    """Send requests until there are no more, and wait for their ends.

    Args:
        stop: ends the run at once when it is set.
        changed: called when a request was sent or has ended.
    """
    progress = Progress()
    began = time.perf_counter()
    stopped = asyncio.ensure_future(stop.wait())
    open_: set[asyncio.Task[None]] = set()

    async def ask(request: Planned) -> None:
        progress.outcomes.append(await client.ask(request, began))
        progress.elapsed_s = time.perf_counter() - began
        changed(progress)

    try:
        for request in requests:
            wait_s = began + request.at_s - time.perf_counter()
            await asyncio.wait({stopped}, timeout=max(0.0, wait_s))
            if stop.is_set():
                break
            task = asyncio.create_task(ask(request))
            open_.add(task)
            task.add_done_callback(open_.discard)
            progress.sent += 1
            changed(progress)
        while open_ and not stop.is_set():
            await asyncio.wait({stopped, *open_}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        progress.unfinished = len(open_)
        rest: list[asyncio.Future[Any]] = [stopped, *open_]
        for future in rest:
            future.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
    if progress.unfinished:
        progress.elapsed_s = time.perf_counter() - began
    return progress
