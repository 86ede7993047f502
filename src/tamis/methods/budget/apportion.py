"""What allocations have in common: shares become whole tokens, and their sum stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tamis.methods.views import LayerView


def bounds(budget: Tensor, views: Sequence[LayerView]) -> tuple[Tensor, Tensor]:
    """What every head can use of its budget, and the most that more could serve it.

    A head of a layer with a sliding window never holds more than the window. A budget that the
    whole prompt fits stays as it is, since nothing would be gained; any other can grow up to the
    prompt.

    Args:
        budget: tokens, int64 [layers, kv_heads], 0 where a layer has no such head.
        views: every layer.

    Returns:
        Usable and largest tokens, both int64 [layers, kv_heads].
    """
    usable, largest = budget.clone(), budget.clone()
    for row, view in enumerate(views):
        window = view.shape.layers[view.layer].window
        reach = max(view.prompt_tokens, int(budget.max())) if window is None else window
        usable[row].clamp_(max=reach)
        largest[row] = usable[row].clamp_min(min(view.prompt_tokens, reach))
        largest[row, len(view.lengths) :] = 0
    return usable, largest


def apportion(wanted: Tensor, total: int, smallest: Tensor, largest: Tensor) -> Tensor:
    """Whole tokens in proportion to what is wanted, within bounds, that add up to `total`.

    They are `clamp(f * wanted, smallest, largest)` with the factor `f` that gives the sum, rounded
    to whole tokens by largest remainder. A total that the bounds do not allow is moved to the next
    that they do.

    Args:
        wanted: at least 0, of any shape.
        total: tokens.
        smallest, largest: int64, shaped like wanted.

    Returns:
        int64, shaped like wanted.
    """
    total = min(max(total, int(smallest.sum())), int(largest.sum()))
    parts = wanted.double().clamp_min(1e-9 * float(wanted.max().clamp_min(1e-9)))
    low, high = 0.0, float((largest / parts).max()) + 1.0
    for _ in range(100):  # the sum grows with the factor: bisection
        middle = (low + high) / 2
        if _within(middle * parts, smallest, largest).sum() < total:
            low = middle
        else:
            high = middle
    exact = _within(high * parts, smallest, largest)
    whole = (exact + 1e-9).floor().long()
    order = (exact - whole).flatten().argsort(descending=True, stable=True)
    rest = total - int(whole.sum())
    extra = torch.zeros_like(whole).flatten()
    extra[order[:rest]] = 1
    return whole + extra.view_as(whole)


def _within(values: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(values, smallest.double()), largest.double())
