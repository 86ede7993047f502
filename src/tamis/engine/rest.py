"""One token that stands for all that a head dropped (RazorAttention's compensation token)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tamis.attention.parts import KVPart
from tamis.cache import Field, PageFormat
from tamis.engine.views import CachedLayer

if TYPE_CHECKING:
    from tamis.engine.lifecycle import Lifecycle

STORE = "rest"


def page_format(k_dim: int, v_dim: int, dtype: torch.dtype) -> PageFormat:
    """A page of one token and how many it stands for."""
    return PageFormat(
        1,
        (
            Field("k", dtype, k_dim),
            Field("v", dtype, v_dim),
            Field("log_count", torch.float32, 1),
        ),
    )


def note(life: Lifecycle, view: CachedLayer, dropped: Tensor) -> None:
    """Count tokens that are about to be dropped among those the rest stands for.

    Args:
        life: whose cache it is.
        view: the layer before they are dropped.
        dropped: which tokens, bool [kv_heads, tokens].

    Raises:
        OutOfPages: the page of the rest does not fit; the tokens still count as not dropped.
    """
    if not bool(dropped.any()):
        return
    layer = life.layers[view.layer]
    k, v = view.keys_values()
    sums = [
        torch.einsum("ht,htd->hd", dropped.float(), k.float()),
        torch.einsum("ht,htd->hd", dropped.float(), v.float()),
        dropped.sum(1).float(),
    ]
    if layer.dropped is not None:
        sums = [new + old for new, old in zip(sums, layer.dropped, strict=True)]
    k_sum, v_sum, count = sums
    heads = count.nonzero()[:, 0].tolist()
    mean = count.clamp_min(1)[:, None]
    dtype = life.shape.dtype
    fields = {
        "k": (k_sum / mean).to(dtype)[heads, None],
        "v": (v_sum / mean).to(dtype)[heads, None],
        "log_count": count.log()[heads, None, None],
    }
    life.cache.clear_store(STORE, view.layer)
    life.cache.put(STORE, (view.layer,), 1, fields, heads=heads)
    layer.dropped = (k_sum, v_sum, count)


def part(life: Lifecycle, layer: int) -> KVPart | None:
    """What a step reads of the rest at one layer; None where nothing was dropped."""
    held = torch.from_numpy(life.cache.store_length(STORE, layer)).to(life.device) > 0
    if not bool(held.any()):
        return None
    page = life.cache.stored(STORE, layer, 0, 1)
    return KVPart(page["k"], page["v"], held[:, None, None], page["log_count"][..., 0])
