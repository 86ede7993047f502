"""What each layer really hands over, found by running the model once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSpec:
    """The attention of one layer: what its pages must hold and how its scores are formed.

    Attributes:
        q_heads, kv_heads: query heads, and KV heads that they share evenly.
        k_dim, v_dim: elements of one key (and query), and of one value.
        scale, window, softcap: as in `Attend`.
        sinks: whether the layer has attention sinks.
    """

    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool


class Probe:
    """An `Attend` that records every layer's spec.

    Its attention is that of sequences of a single token each, which see only themselves: the
    values come back as they are.
    """

    def __init__(self) -> None:
        self.order: list[int] = []
        self.specs: list[LayerSpec] = []

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.order.append(layer)
        self.specs.append(
            LayerSpec(
                q_heads=q.shape[1],
                kv_heads=k.shape[1],
                k_dim=k.shape[2],
                v_dim=v.shape[2],
                scale=float(scale),
                window=window,
                softcap=softcap,
                sinks=sinks is not None,
            )
        )
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def probe_tokens(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The probe's batch: ids [3] and positions [3] of three sequences of one token."""
    ids = torch.arange(3, device=device) % vocab_size
    return ids, torch.zeros_like(ids)
