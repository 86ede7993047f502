"""Fills a `Trace` with what a sequence's cache holds when it ends."""

from __future__ import annotations

from tamis.engine.lifecycle import Lifecycle
from tamis.engine.trace import Trace


def finish(trace: Trace, life: Lifecycle) -> None:
    """Note the kept positions of every layer and KV head."""
    trace.settle_budgets(life.budgets, [layer.kv_heads for layer in life.shape.layers])
    trace.positions = [
        [life.cache.positions(i, head).tolist() for head in range(layer.kv_heads)]
        for i, layer in enumerate(life.shape.layers)
    ]
