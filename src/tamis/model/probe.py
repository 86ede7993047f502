"""What each layer really hands over, found by running the model once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tamis.errors import UnsupportedModelError

PROBE_TOKENS = 3
"""How many tokens a probe runs: enough to tell positions apart."""


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
    """An `Attend` that records what every layer hands over.

    In its attention every token sees only itself, so the values come back as they are.

    Attributes:
        order: the layers in the order in which they called.
        specs: what each call handed over.
        rotated: the queries and keys of each call.
        modules: the attention module of each call, noted by the attention function.
    """

    def __init__(self) -> None:
        self.order: list[int] = []
        self.specs: list[LayerSpec] = []
        self.rotated: list[tuple[Tensor, Tensor]] = []
        self.modules: list[nn.Module] = []

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
        self.rotated.append((q, k))
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

    def rotates_like(self, other: Probe) -> bool:
        """Whether the queries and keys of both are the same, up to rounding."""
        return all(
            torch.allclose(mine.float(), theirs.float(), rtol=1e-2, atol=1e-3)
            for layer, others in zip(self.rotated, other.rotated, strict=True)
            for mine, theirs in zip(layer, others, strict=True)
        )


def check_layers(probe: Probe, n_layers: int) -> None:
    """Raise UnsupportedModelError unless each of `n_layers` layers called once, in order."""
    if not probe.order:
        raise UnsupportedModelError("its code does not use Transformers' attention interface")
    if probe.order != list(range(n_layers)):
        raise UnsupportedModelError(
            f"it has {n_layers} layers but attends in layers {probe.order}, and every layer must "
            "have its own attention and use it once"
        )
