"""Random layers to evict from."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.methods.base import Evict
from tests.methods.layer import NaiveLayerView, layer_view


def random_layer(
    seed: int,
    tokens: int = 40,
    *,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 64,
    dropped: tuple[int, ...] = (),
    **given: object,
) -> NaiveLayerView:
    """A layer with keys of 8 and values of 6 channels, after a prompt of `tokens` tokens.

    Args:
        seed: of everything random.
        tokens: of the prompt.
        kv_heads, group: heads, and query heads that share one.
        queries: how many of the last ones are there.
        dropped: how many tokens each head lost, at random but never the last 12.
        given: passed to `layer_view`.
    """
    draw = torch.Generator().manual_seed(seed)
    lengths = [tokens - lost for lost in dropped] if dropped else [tokens] * kv_heads
    positions = torch.zeros(kv_heads, max(lengths), dtype=torch.int64)
    for head, length in enumerate(lengths):
        old = torch.randperm(tokens - 12, generator=draw)[: length - 12] if length > 12 else []
        kept = [*sorted(int(p) for p in old), *range(tokens - min(12, length), tokens)]
        positions[head, :length] = torch.tensor(kept)
    attention = torch.rand(kv_heads, max(lengths), generator=draw)
    defaults = {"lengths": lengths, "positions": positions, "attention": attention}
    return layer_view(
        torch.randn(kv_heads, max(lengths), 8, generator=draw),
        torch.randn(kv_heads, max(lengths), 6, generator=draw),
        2 * torch.randn(min(queries, tokens), kv_heads * group, 8, generator=draw),
        **{"prompt_tokens": tokens, **defaults, **given},
    )


def decide(method: Evict, view: NaiveLayerView, budget: int | list[int]) -> Tensor:
    """What the method keeps with a budget (for all heads, or one for each)."""
    budgets = [budget] * len(view.lengths) if isinstance(budget, int) else budget
    return method.keep(view, method.scores(view), torch.tensor(budgets))


def kept_positions(view: NaiveLayerView, kept: Tensor) -> list[list[int]]:
    """Absolute positions of what is kept, per head."""
    assert not (kept & ~view.cached).any(), "keeps tokens that do not exist"
    return [row[mask].tolist() for row, mask in zip(view.positions, kept, strict=True)]


def best(scores: list[float], count: int) -> set[int]:
    """Indices of the highest scores, of equal ones the earlier."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: max(0, count)])
