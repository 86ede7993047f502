"""Hydragen: decode attention over what several sequences begin with, done once for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tamis.attention import decode, prefill
from tamis.attention.merge import merge_states
from tamis.cache import BatchView, CommonPrefix
from tamis.engine.views import LayerOptions

WORTH = 32_768
"""Tokens that sharing must spare a step from reading again, in each layer: shared tokens, times one
less than there are sequences. Below about so many its second kernel costs more than it saves
(`benchmarks/shared_prefix.py` measures it)."""


class SharedDecode:
    """One query each of sequences some of which share leading pages.

    Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes"
    (arXiv:2402.05099): the attention of all the queries over a shared prefix is one product of
    matrices, because they read the same keys; that of each query over what follows is its own; and
    the two are merged by their log-sum-exps (section 3.1), so the result is exact. Where prefixes
    branch, each sequence is in the group where sharing spares the most.

    Args:
        common: which sequences share what.
        n: sequences, of which there is one query each.
    """

    def __init__(self, common: CommonPrefix, n: int) -> None:
        self._common = common
        self._n = n

    @classmethod
    def of(cls, view: BatchView, n: int) -> SharedDecode | None:
        """The shared decode of the first `n` sequences of a step; None if they share too little."""
        common = CommonPrefix.of(view, n, WORTH)
        return None if common is None else cls(common, n)

    def __call__(self, layer: int, q: Tensor, options: LayerOptions) -> tuple[Tensor, Tensor]:
        """Attention at one layer without a window.

        Args:
            layer: the layer.
            q: [n, q_heads, k_dim].
            options: how it attends.

        Returns:
            `(out, lse)` as `tamis.attention.decode`.
        """
        common = self._common
        own = common.own(layer, self._n)
        how: dict[str, Any] = {"scale": options.scale, "softcap": options.softcap}
        out, lse = decode(q, own, sinks=options.sinks, **how)
        nothing = q.new_empty(0, own.lengths.shape[1], q.shape[2])
        no_value = q.new_empty(0, own.lengths.shape[1], out.shape[2])
        for i, rows in enumerate(common.groups):
            queries = q[rows]
            at = torch.arange(len(rows), device=q.device)
            shared, shared_lse = prefill(
                queries,
                nothing,
                no_value,
                common.shared(layer, i),
                positions=at,
                own=False,
                **how,
            )
            merged, merged_lse = merge_states(out[rows].float(), lse[rows], shared, shared_lse)
            out[rows], lse[rows] = merged.to(out.dtype), merged_lse
        return out, lse
