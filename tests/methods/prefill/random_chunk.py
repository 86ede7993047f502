"""Random chunks, and sums of attention weights pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.chunk import NaiveChunkView, chunk_view


def random_chunk(
    seed: int, tokens: int, past: Sequence[int], *, group: int = 2, spread: float = 2.0
) -> NaiveChunkView:
    """A chunk of `tokens` after `past[head]` cached keys; a larger `spread` sharpens attention."""
    torch.manual_seed(seed)
    q = spread * torch.randn(tokens, group * len(past), 8)
    k = torch.randn(len(past), max(past) + tokens, 8)
    return chunk_view(q, k, lengths=list(past))


def past_of(view: NaiveChunkView, head: int) -> int:
    """Cached keys of a query head."""
    return int(view.lengths[head // (view.q.shape[1] // len(view.k))])


def lines(view: NaiveChunkView, head: int, last_q: int) -> tuple[list[float], list[float]]:
    """Sums of the last queries' weights per key and per offset of a query head."""
    weights = view.window(last_q)[head]
    keys = past_of(view, head) + len(view.q)
    verticals, slashes = [0.0] * keys, [0.0] * keys
    for row, of_query in enumerate(weights.tolist()):
        own = keys - len(weights) + row
        for key in range(own + 1):
            verticals[key] += of_query[key]
            slashes[own - key] += of_query[key]
    return verticals, slashes


def largest(values: Sequence[float], count: int, among: Sequence[int] | None = None) -> set[int]:
    """Indices of the `count` largest values, the earlier of equals."""
    order = sorted(range(len(values)) if among is None else among, key=lambda i: -values[i])
    return set(order[:count])
