"""Attention over encoded pages in plain torch: some pages are restored at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.attention.encoding import PageEncoding, restore
from tamis.attention.merge import merge_states
from tamis.attention.reference import TILE, attend
from tamis.cache.format import PagedKV


def decode(
    q: Tensor,
    kv: PagedKV,
    encoding: PageEncoding,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`tamis.attention.encoded.decode_encoded`, whose docstring holds."""
    n, q_heads, k_dim = q.shape
    kv_heads, size = kv.lengths.shape[1], kv.format.page_size
    grouped = q.float().reshape(n, kv_heads, q_heads // kv_heads, k_dim)
    held = kv.lengths // size
    state: tuple[Tensor, Tensor] | None = None
    most = int(held.max()) if held.numel() else 0
    for first in range(0, max(1, most), max(1, TILE // size)):
        last = min(first + max(1, TILE // size), most)
        exists = torch.arange(first, last, device=held.device) < held[..., None]
        k, v = (x.flatten(2, 3) for x in _restored(kv, encoding, exists, first, last))
        visible = exists.repeat_interleave(size, 2)[:, :, None]
        part = attend(grouped, k, v, visible, scale, softcap)
        state = part if state is None else merge_states(*state, *part)
    assert state is not None
    out, lse = state
    return out.flatten(1, 2), lse.flatten(1, 2)


def _restored(
    kv: PagedKV, encoding: PageEncoding, exists: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of the pages first .. last - 1, [n, kv_heads, pages, page_size, dim]; zero
    where a head has no such page."""
    pages = torch.where(exists, kv.tables[..., first:last], 0).long()
    fields = {
        name: kv.format.view(kv.data, name)[pages].masked_fill_(~exists[..., None, None], 0)
        for name in encoding.fields
    }
    return restore(fields, encoding)
