"""What a plan did to one request, recorded for `LLM.inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field

from tamis.cache.pool import IntArray

LIVE = "live"
"""What `Trace.bytes` calls pages of exact keys and values; others go by their store's name."""

WAITING = "waiting"
"""What it calls the hidden states of tokens that wait at the layer's input."""


@dataclass(frozen=True)
class ReadStep:
    """What one step after the prompt read of one layer.

    Attributes:
        step: tokens generated and cached before it, 0 for the step after the prompt's last. A step
            that verifies a draft caches several.
        layer: the layer.
        tokens: tokens read, per KV head, the step's own among them.
        cached: tokens that could be read, per KV head.
        pages: the pages that something was read of, per KV head ascending, where a method selects;
            None where none does. Numbers count the pages of the head's cache, encoded ones first.
    """

    step: int
    layer: int
    tokens: tuple[int, ...]
    cached: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...] | None = None


@dataclass
class Trace:
    """Everything recorded about one sequence; `positions` and what follows only at its end.

    Attributes:
        pairs: per layer the pairs of queries and keys that the prompt's attention computed, the
            mean of the heads.
        reads: in the order of the steps.
        positions: per layer and KV head the numbers of the tokens that the cache holds, ascending,
            int32: prompt tokens from 0, generated ones after them.
        budgets: tokens that each KV head may keep, per layer; None in plans that set no budget.
        bytes: per layer the bytes of its pages, and of hidden states that wait there, by what they
            are; of pages that layers share, each has its part.
        dense_bytes: per layer the bytes of exact attention for the same tokens.
    """

    pairs: dict[int, float] = field(default_factory=dict)
    reads: list[ReadStep] = field(default_factory=list)
    positions: list[list[IntArray]] = field(default_factory=list)
    budgets: list[list[int]] | None = None
    bytes: list[dict[str, int]] = field(default_factory=list)
    dense_bytes: list[int] = field(default_factory=list)

    def restart(self) -> None:
        """Forget everything: the sequence is computed again from its first token."""
        for recorded in (self.pairs, self.reads, self.positions, self.bytes, self.dense_bytes):
            recorded.clear()
        self.budgets = None

    def count_pairs(self, layer: int, pairs: float) -> None:
        """Add a chunk's pairs of queries and keys, the mean of the heads."""
        self.pairs[layer] = self.pairs.get(layer, 0.0) + pairs
