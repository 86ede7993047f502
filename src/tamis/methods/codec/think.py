"""ThinK: the key channels that matter least to the queries are not stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.attention.encoding import Encoding, PageEncoding, Plain, Pruned
from tamis.errors import PlanError
from tamis.methods.base import Codec, param
from tamis.methods.views import Column, LayerView, Needs, group_sum, top_mask


@dataclass(frozen=True)
class ThinK(Codec):
    """Of each head's key channels the `1 - ratio` with the largest part in the attention scores of
    the last queries are stored; the others read as zero, so `q . k` is the product of the rest.

    `score[c] = || Q[-window:, c] K[:, c]^T ||_F = || Q[-window:, c] || * || K[:, c] ||`, and the
    `floor((1 - ratio) * k_dim)` channels of highest score stay.
    Defaults: the paper's pruning ratio 0.4, observation window of 32 queries, and 32 recent tokens
    whose keys keep all channels. As in the paper a page holds a mask of its channels beside the
    pruned keys.

    Departures: with grouped queries the scores of the query heads that share a key head are
    summed. Channels are chosen once per layer and head, from all keys that are cached when the
    prompt ends, and serve the pages that follow. Values stay whole: the
    paper's pruning of value channels is an experiment of its appendix.

    A token costs `kept + v_dim` elements of the model's dtype, and a page `k_dim` bytes more.
    """

    paper: ClassVar[str] = "ThinK: Thinner Key Cache by Query-Driven Pruning (arXiv:2407.21018)"
    query_dependent: ClassVar[bool] = True

    ratio: float = param(0.4, "share of the key channels that are pruned", minimum=0, maximum=1)
    window: int = param(32, "last queries that score the channels", minimum=1)
    residual: int = param(32, "last tokens whose keys keep all channels", minimum=0)

    def needs(self) -> Needs:
        return Needs(queries=self.window)

    def columns(self, page_size: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> list[Column]:
        kept = self._kept(k_dim)
        if kept == 0:
            raise PlanError(
                f"{self}: no key channel of {k_dim} stays; ratio must be at most {1 - 1 / k_dim:g}"
            )
        return [
            Column("k_kept", dtype, kept),
            Column("k_mask", torch.uint8, k_dim, rows=1),
            Column("v", dtype, v_dim),
        ]

    def encode(self, k: Tensor, v: Tensor, view: LayerView) -> dict[str, Tensor]:
        mask = view.state.get("think")
        if mask is None:
            mask = view.state["think"] = self._mask(view)
        mask = mask[:, None, None].expand(-1, k.shape[1], -1, -1)
        return {
            "k_kept": k.gather(3, self._channels(mask).expand(-1, -1, k.shape[2], -1)),
            "k_mask": mask.to(torch.uint8),
            "v": v,
        }

    def encoding(self) -> PageEncoding:
        return PageEncoding(Encoding(Pruned()), Encoding(Plain()))

    def _kept(self, k_dim: int) -> int:
        # (1 - 0.9) * 10 is a hair below 1 in floating point, and is meant to be 1.
        return int((1 - self.ratio) * k_dim + 1e-6)

    def _mask(self, view: LayerView) -> Tensor:
        """Which channels stay, bool [kv_heads, k_dim]."""
        k, _ = view.keys_values()
        kv_heads, _, k_dim = k.shape
        query_norms = view.queries(self.window).float().norm(dim=0)  # [q_heads, k_dim]
        key_norms = torch.linalg.vector_norm(k, dim=1, dtype=torch.float32)
        scores = group_sum(query_norms, kv_heads) * key_norms
        return top_mask(scores, [self._kept(k_dim)] * kv_heads)

    def _channels(self, mask: Tensor) -> Tensor:
        """The channels that stay, ascending, int64 [kv_heads, pages, 1, kept]."""
        order = mask.to(torch.uint8).argsort(dim=3, descending=True, stable=True)
        return order[..., : self._kept(mask.shape[3])]
