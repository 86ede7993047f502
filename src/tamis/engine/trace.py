"""What a plan did to one request, recorded for `LLM.inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ReadStep:
    """What one generated token read of one layer.

    Attributes:
        step: which generated token, from 0.
        layer: the layer.
        tokens: tokens read, per KV head; cached: tokens that could be read, per KV head.
        pages: with page selection, the pages read of each KV head; None where all were read.
    """

    step: int
    layer: int
    tokens: tuple[int, ...]
    cached: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...] | None = None


@dataclass
class Trace:
    """Everything recorded about one sequence.

    Attributes:
        density: per layer, pairs of queries and keys that the prompt computed, and all causal ones.
        reads: per decode step and layer.
        positions: at the end, per layer and KV head the absolute positions in the cache, ascending.
        budgets: tokens per head that a budget method allotted, [layers][kv_heads]; None without.
        bytes: at the end, per layer the bytes of its pages by the name of their format.
    """

    density: dict[int, list[float]] = field(default_factory=dict)
    reads: list[ReadStep] = field(default_factory=list)
    positions: list[list[list[int]]] = field(default_factory=list)
    budgets: list[list[int]] | None = None
    bytes: list[dict[str, int]] = field(default_factory=list)

    def count_pairs(self, layer: int, computed: float, causal: float) -> None:
        """Add a chunk's pairs of queries and keys."""
        pairs = self.density.setdefault(layer, [0.0, 0.0])
        pairs[0] += computed
        pairs[1] += causal

    def settle_budgets(self, budgets: Tensor | None, kv_heads: list[int]) -> None:
        """Note the budgets [layers, heads], without what pads them."""
        if budgets is not None:
            self.budgets = [row[:n].tolist() for row, n in zip(budgets, kv_heads, strict=True)]
