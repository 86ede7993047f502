"""What evictions that protect the newest tokens have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.methods.views import LayerView, top_mask


def recent(view: LayerView, counts: Tensor | int) -> Tensor:
    """The last `counts` cached tokens of each head.

    Args:
        view: the layer.
        counts: for all heads, or int64 [kv_heads].

    Returns:
        bool [kv_heads, tokens].
    """
    counts = torch.as_tensor(counts, device=view.lengths.device).expand_as(view.lengths)
    first = (view.lengths - counts)[:, None]
    return view.cached & (torch.arange(view.cached.shape[1], device=first.device) >= first)


def keep_recent_and_top(
    view: LayerView, scores: Tensor, recent_tokens: Tensor | int, budget: Tensor
) -> Tensor:
    """The newest tokens, then the highest scores among the others.

    Args:
        view: the layer.
        scores: [kv_heads, tokens].
        recent_tokens: how many of the newest come first, for all heads or int64 [kv_heads]. A
            budget below that keeps the newest of them.
        budget: tokens per head, int64 [kv_heads].

    Returns:
        bool [kv_heads, tokens].
    """
    newest = recent(view, budget.clamp(max=torch.as_tensor(recent_tokens, device=budget.device)))
    others = scores.clamp_max(torch.finfo(scores.dtype).max).masked_fill(~view.cached, -torch.inf)
    return top_mask(others.masked_fill(newest, torch.inf), budget)
