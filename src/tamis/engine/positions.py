"""Keys that attend from other positions than those they were computed at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tamis.engine.views import CachedLayer

if TYPE_CHECKING:
    from tamis.engine.lifecycle import Lifecycle

_NOWHERE = torch.iinfo(torch.int64).max


def renumber(life: Lifecycle, layers: range) -> None:
    """Rotate keys so that a head's tokens attend as if they lay at consecutive positions that end
    at the newest token's (StreamingLLM, section 3.2).

    Only distances count, so nothing is done to the tokens behind the last gap. Those before it are
    rotated from the keys they were computed with, which are kept beside the cache, in its dtype: to
    rotate them on and on would round them on and on.

    Args:
        life: whose cache it is; no page of it is shared.
        layers: layers of one shape.
    """
    cache = life.cache
    view = CachedLayer(life, layers.start, len(layers))
    newest, at = cache.next_position - 1, torch.arange(view.cached.shape[1], device=life.device)
    delta = (newest - view.lengths[:, None] + 1 + at - view.positions).masked_fill(~view.cached, 0)
    before_gap = int((delta != 0).sum(1).max())
    if not before_gap:
        return
    delta = delta[:, :before_gap]
    own = view.positions[:, :before_gap].masked_fill(~view.cached[:, :before_gap], _NOWHERE)
    k = _originals(life, view, own)
    by_layer = k.view(len(layers), -1, k.shape[2])
    turned = life.shift_keys(layers, by_layer, delta.reshape(len(layers), -1)).view_as(k)
    moved = delta != 0
    indices = [head.nonzero()[:, 0].cpu().numpy() for head in moved]
    cache.write(layers, indices, [keys[at] for keys, at in zip(turned, moved, strict=True)])


def _originals(life: Lifecycle, view: CachedLayer, positions: Tensor) -> Tensor:
    """The first tokens of every head as they were computed, [kv_heads, m, k_dim]; from now on they
    are kept.

    Args:
        life: whose.
        view: the layers.
        positions: the tokens', int64 [kv_heads, m], `_NOWHERE` where a head has fewer.
    """
    known = life.originals.get(view.layer)
    if known is not None:
        place = torch.searchsorted(known[0], positions).clamp_max(known[0].shape[1] - 1)
        found = (known[0].gather(1, place) == positions)[..., None]
        k = known[1].gather(1, place[..., None].expand(-1, -1, known[1].shape[2]))
    if known is None or not bool(found.all()):
        cached = life.cache.keys_values(view.layers, 0, positions.shape[1])[0]
        k = cached.contiguous() if known is None else torch.where(found, k, cached)
    life.originals[view.layer] = (positions.contiguous(), k)
    return k
