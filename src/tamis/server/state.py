"""What a server does at this moment, for its dashboard: the engine between two steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tamis.cache import PagedCache, SequenceCache, Store
from tamis.engine.engine import Engine
from tamis.engine.sequence import Request, Sequence
from tamis.server.metrics import describe

SHOWN = 50
"""Requests that are shown one by one at the most."""


@dataclass(frozen=True)
class Pages:
    """Pages of one format in one tier, and their bytes."""

    tier: Literal["device", "host"]
    format: str
    pages: int
    bytes: int


@dataclass(frozen=True)
class Tier:
    """A memory for pages, in bytes."""

    name: Literal["device", "host"]
    capacity: int
    in_use: int


@dataclass(frozen=True)
class LiveRequest:
    """A request that waits or runs. Bytes; `age_s` in seconds since it came.

    Attributes:
        id: the engine's; "context" where a context is being made.
        state: "waiting", "running" or "swapped", as the first of its sequences.
        prompt_done: tokens of the prompt that are computed, or were there.
        pages: its own and those that it shares, each counted once.
        kv_bytes: of these pages; `kv_bytes_dense`: what exact attention would hold by now.
    """

    id: str
    plan: str
    state: str
    priority: int
    age_s: float
    prompt_tokens: int
    prompt_done: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    pages: list[Pages]
    kv_bytes: int
    kv_bytes_dense: int


@dataclass(frozen=True)
class Queue:
    """How many sequences wait, run and lie swapped, and how many may run."""

    waiting: int
    running: int
    swapped: int
    max_running: int


@dataclass(frozen=True)
class Totals:
    """Counters since the server began; their differences are rates."""

    steps: int
    step_s: float
    prefill_tokens: int
    decode_tokens: int
    preemptions: int


@dataclass(frozen=True)
class Prefixes:
    """What later requests found of earlier ones."""

    enabled: bool
    lookups: int
    hits: int
    looked_up_tokens: int
    hit_tokens: int
    bytes: int


@dataclass(frozen=True)
class EngineState:
    """The engine between two steps; `at` is in seconds of a clock that only goes forward, and
    `context_bytes` are the pages of all contexts."""

    at: float
    queue: Queue
    totals: Totals
    prefixes: Prefixes
    tiers: list[Tier]
    pages: list[Pages]
    context_bytes: int
    requests: list[LiveRequest]


def engine_state(engine: Engine) -> EngineState:
    """The state of an engine; must run in its thread."""
    scheduler, stats, prefixes = engine.scheduler, engine.stats, engine.prefixes
    sequences = [*scheduler.running, *scheduler.swapped, *scheduler.waiting]
    requests = sorted({s.request for s in sequences}, key=lambda request: request.arrival)
    return EngineState(
        at=time.monotonic(),
        queue=Queue(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            swapped=len(scheduler.swapped),
            max_running=scheduler.max_running,
        ),
        totals=Totals(
            stats.steps,
            stats.step_s,
            stats.prefill_tokens,
            stats.decode_tokens,
            stats.preemptions,
        ),
        prefixes=Prefixes(
            prefixes.enabled,
            prefixes.lookups,
            prefixes.hits,
            prefixes.looked_up_tokens,
            prefixes.hit_tokens,
            prefixes.tree.bytes,
        ),
        tiers=list(_tiers(engine.cache)),
        pages=list(_pages(engine.cache)),
        context_bytes=engine.context_bytes,
        requests=[_live(request, engine) for request in requests[:SHOWN]],
    )


def _tiers(cache: PagedCache) -> Iterator[Tier]:
    arena = cache.device_tier.arena
    yield Tier("device", arena.capacity_bytes, arena.bytes_in_use)
    host = cache.host_tier.arena
    capacity = host.capacity_bytes + cache.swap_bytes
    if capacity:
        yield Tier("host", capacity, host.bytes_in_use + cache.swap_bytes_in_use)


def _pages(cache: PagedCache) -> Iterator[Pages]:
    names: tuple[Literal["device", "host"], ...] = ("device", "host")
    for name, tier in zip(names, (cache.device_tier, cache.host_tier), strict=True):
        for pool in tier.pools:
            if pool.bytes_in_use:
                n_pages = pool.bytes_in_use // pool.page_bytes
                yield Pages(name, describe(pool.format), n_pages, pool.bytes_in_use)


def _live(request: Request, engine: Engine) -> LiveRequest:
    first = request.sequences[0]
    pages = list(_pages_of(request.sequences, engine.cache))
    n_longest = max(sequence.n_computed for sequence in request.sequences)
    return LiveRequest(
        id=request.id if request.makes is None else "context",  # its name is its owner's
        plan=str(request.plan),
        state=first.status.name.lower(),
        priority=request.priority,
        age_s=time.perf_counter() - request.arrived_s,
        prompt_tokens=len(request.prompt_ids),
        prompt_done=min(first.n_computed, len(request.prompt_ids)),
        cached_tokens=request.cached_tokens,
        output_tokens=sum(sequence.n_output for sequence in request.sequences),
        preemptions=request.preemptions,
        pages=pages,
        kv_bytes=sum(of_format.bytes for of_format in pages),
        kv_bytes_dense=engine.layout.bytes_for(n_longest),
    )


def _pages_of(sequences: Iterable[Sequence], cache: PagedCache) -> Iterator[Pages]:
    """By tier and format; in the host's memory all formats are one."""
    caches = [sequence.cache for sequence in sequences if sequence.cache is not None]
    if not caches:
        return
    ids, pools = map(np.concatenate, zip(*(c.held_pages() for c in caches), strict=True))
    _, first = np.unique(ids, return_index=True)
    for number, n_pages in enumerate(np.bincount(pools[first])):
        if n_pages:
            pool = cache.pools[number]
            n_bytes = int(n_pages) * pool.page_bytes
            yield Pages("device", describe(pool.format), int(n_pages), n_bytes)
    stores = {
        id(store): store
        for of_sequence in caches
        for store in of_sequence.stores.values()
        if store.tier is not of_sequence.tier
    }
    swapped = [of_sequence for of_sequence in caches if of_sequence.swapped]
    in_host: list[SequenceCache | Store] = [*swapped, *stores.values()]
    if in_host:
        n_pages = sum(int(part.page_counts.sum()) for part in in_host)
        yield Pages("host", "all formats", n_pages, sum(part.bytes for part in in_host))
