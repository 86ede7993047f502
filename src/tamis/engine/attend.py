"""One step's attention: append the new keys and values, then decode and prefill over the pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tamis.attention import decode, prefill
from tamis.cache import BatchView


class StepAttention:
    """What every layer of the model calls back with the queries, keys and values of a step.

    Args:
        view: the step's sequences and their pages.
        counts: new tokens of each sequence; those with one token come first.
        positions: int32 [tokens], absolute position of each new token.
    """

    def __init__(self, view: BatchView, counts: Sequence[int], positions: torch.Tensor) -> None:
        self._view = view
        self._positions = positions
        self._n_decode = sum(count == 1 for count in counts)
        self._chunks: list[tuple[int, int, int]] = []  # (sequence, first token, end)
        end = self._n_decode
        for i, count in enumerate(counts[self._n_decode :], self._n_decode):
            self._chunks.append((i, end, end + count))
            end += count

    def __call__(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one layer for all tokens of the step.

        Args:
            layer: the layer's index.
            q: [tokens, q_heads, k_dim]; k: [tokens, kv_heads, k_dim]; v: [tokens, kv_heads, v_dim].
            scale, window, softcap, sinks: as in `tamis.attention.decode`.

        Returns:
            [tokens, q_heads, v_dim], of q's dtype.
        """
        view, positions, n = self._view, self._positions, self._n_decode
        view.append(layer, k, v)
        parts = []
        if n:
            out, _ = decode(
                q[:n],
                view.pages(layer, 0, n, with_new=True),
                scale=scale,
                positions=positions[:n],
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
            parts.append(out)
        for i, start, end in self._chunks:
            out, _ = prefill(
                q[start:end],
                k[start:end],
                v[start:end],
                view.pages(layer, i, i + 1, with_new=False),
                scale=scale,
                positions=positions[start:end],
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
