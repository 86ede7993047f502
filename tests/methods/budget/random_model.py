"""Random layers of one model, to share a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.methods.views import LayerShape, ModelShape
from tests.methods.layer import NaiveLayerView, layer_view


def random_model(
    seed: int,
    *,
    prompt_tokens: int = 48,
    kv_heads: tuple[int, ...] = (2, 2, 2, 2),
    windows: tuple[int | None, ...] | None = None,
    similarity: tuple[float, ...] | None = None,
    sharpness: tuple[float, ...] | None = None,
) -> list[NaiveLayerView]:
    """A view of every layer after a prompt, each KV head read by two query heads.

    Args:
        seed: of everything random.
        prompt_tokens: all cached.
        kv_heads: per layer.
        windows: sliding windows per layer; what lies before them is not cached.
        similarity: of the hidden states, per layer; by default random.
        sharpness: of the attention, per layer; by default 1, 2, 3, ...
    """
    draw = torch.Generator().manual_seed(seed)
    n = len(kv_heads)
    windows = windows or (None,) * n
    sharpness = sharpness or tuple(range(1, n + 1))
    similarity = similarity or tuple(torch.rand(n, generator=draw).tolist())
    shapes = (LayerShape(2 * h, h, 8, 8, w) for h, w in zip(kv_heads, windows, strict=True))
    shape = ModelShape(tuple(shapes), vocab_size=16, dtype=torch.float32)
    views = []
    for layer, (heads, window) in enumerate(zip(kv_heads, windows, strict=True)):
        tokens = min(prompt_tokens, window or prompt_tokens)
        views.append(
            layer_view(
                torch.randn(heads, tokens, 8, generator=draw),
                torch.randn(heads, tokens, 8, generator=draw),
                sharpness[layer] * torch.randn(prompt_tokens, 2 * heads, 8, generator=draw),
                positions=torch.arange(prompt_tokens - tokens, prompt_tokens).expand(heads, -1),
                prompt_tokens=prompt_tokens,
                layer=layer,
                shape=shape,
                similarity=similarity[layer],
            )
        )
    return views


def budgets(views: list[NaiveLayerView], tokens: int) -> Tensor:
    """The same budget for every head, as the engine hands it over."""
    rows = torch.zeros(len(views), max(len(view.lengths) for view in views), dtype=torch.int64)
    for row, view in zip(rows, views, strict=True):
        row[: len(view.lengths)] = tokens
    return rows


def random_scores(views: list[NaiveLayerView], seed: int) -> list[Tensor]:
    """Scores whose heads differ."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.rand(view.positions.shape, generator=draw)
        ** torch.arange(1, len(view.lengths) + 1)[:, None]
        for view in views
    ]
