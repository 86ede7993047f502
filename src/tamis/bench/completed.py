"""Running many requests as one continuous batch, each handed back the moment it ends."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from tamis.engine.outputs import RequestOutput
from tamis.llm import LLM
from tamis.plan import Plan
from tamis.sampling import SamplingParams

T = TypeVar("T")

_OPEN = 64
"""Requests the engine knows of at once: enough to fill every step, few enough that the prompts of
a long run are encoded as they are needed."""


@dataclass(frozen=True)
class Order(Generic[T]):
    """A request, and what it is to its sender."""

    tag: T
    prompt: list[int]
    params: SamplingParams
    plan: Plan


def as_completed(
    llm: LLM, orders: Iterable[Order[T]]
) -> Generator[tuple[T, RequestOutput], None, None]:
    """Run all orders, yielding each one's tag and output when it ends; closing frees all pages.

    A request that failed while running has finish_reason "error".

    Raises:
        RequestError, KVMemoryError: an order cannot be run at all.
    """
    waiting = iter(orders)
    running: dict[str, T] = {}
    engine = llm.engine
    try:
        while True:
            for order in islice(waiting, _OPEN - len(running)):
                name = engine.add_request(order.prompt, order.params, order.plan)
                running[name] = order.tag
            if not running:
                return
            for increment in engine.step():
                if increment.output is not None:
                    yield running.pop(increment.request_id), increment.output
    finally:
        for name in running:
            engine.abort(name)
