"""MiniCache: adjacent layers of the deeper half store one direction per token for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tamis.methods.base import Share, param
from tamis.methods.views import Column


@dataclass(frozen=True)
class MiniCache(Share):
    """Keys and values of adjacent layers point much the same way from the middle of the model on:
    one direction between both is stored per token, and a length for each layer.

    With `Omega` the angle between the vectors `x` of the first and `y` of the second layer, the
    direction is `e = sin((1 - t) Omega) / sin(Omega) x / |x| + sin(t Omega) / sin(Omega) y / |y|`
    (SLERP), and the layers read `e |x|` and `e |y|` (cross-layer merging and cache restoration).
    Tokens whose pair differs most keep both: with `d = Omega / pi`, those with
    `d > d_max - gamma (d_max - d_min)` over the tokens (token retention). Defaults: the paper's t =
    0.6, gamma = 0.05, merging from the middle layer S = L / 2 on.

    Departures: vectors, lengths and angles are those of single heads, which merges closer than the
    angle of all heads at once; `d` is the mean over the heads, so that a token is merged in all of
    them or in none, and in keys and values or in neither. The paper's threshold,
    `d < d_min + gamma (d_max - d_min)`, names the least similar pairs only if `d` is read as a
    similarity; it is followed in that sense, which its text states. Only what is there when the
    prompt ends is merged; generated tokens stay in both layers.

    A merged token costs `k_dim + v_dim` elements and 16 bytes for both layers together.
    """

    paper: ClassVar[str] = (
        "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models "
        "(arXiv:2405.14366)"
    )

    start: float = param(
        0.5, "share of the layers, from the first, that are not merged", minimum=0, maximum=1
    )
    t: float = param(0.6, "weight of the second layer's direction", minimum=0, maximum=1)
    gamma: float = param(
        0.05, "share of the range of distances in which pairs stay apart", minimum=0, maximum=1
    )

    def pairs(self, n_layers: int) -> list[tuple[int, int]]:
        first = int(self.start * n_layers)
        return [(layer, layer + 1) for layer in range(first, n_layers - 1, 2)]

    def columns(self, k_dim: int, v_dim: int, dtype: torch.dtype) -> list[Column]:
        return [
            Column("k_direction", dtype, k_dim),
            Column("k_norms", torch.float32, 2),
            Column("v_direction", dtype, v_dim),
            Column("v_norms", torch.float32, 2),
        ]

    def merge(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        angles = [_angle(x, y) for x, y in zip(first, second, strict=True)]
        merged = ~(self._retained(angles[0]) | self._retained(angles[1]))
        fields = {}
        for name, x, y, angle in zip("kv", first, second, angles, strict=True):
            x, y, angle = x[:, merged], y[:, merged], angle[:, merged]
            norms = torch.stack((x.float().norm(dim=2), y.float().norm(dim=2)), dim=2)
            fields[f"{name}_direction"] = self._between(x, y, angle).to(x.dtype)
            fields[f"{name}_norms"] = norms
        return merged, fields

    def restore(self, page: dict[str, Tensor], member: int) -> tuple[Tensor, Tensor]:
        lengths = slice(member, member + 1)
        k = page["k_direction"].float() * page["k_norms"][..., lengths]
        v = page["v_direction"].float() * page["v_norms"][..., lengths]
        return k, v

    def _retained(self, angle: Tensor) -> Tensor:
        """Which tokens stay apart, bool [tokens], by the angles [kv_heads, tokens]."""
        distance = angle.mean(dim=0) / torch.pi
        if not distance.numel():
            return distance > 0
        low, high = distance.aminmax()
        return distance > high - self.gamma * (high - low)

    def _between(self, x: Tensor, y: Tensor, angle: Tensor) -> Tensor:
        """SLERP from the direction of `x` to that of `y`, unit vectors, fp32, like `x`."""
        angle = angle[..., None]
        # Where both directions are one (or opposite) the formula is 0 / 0; its limit is linear.
        lines = angle.sin() > 1e-4
        weight_x = torch.where(lines, ((1 - self.t) * angle).sin(), 1 - self.t)
        weight_y = torch.where(lines, (self.t * angle).sin(), self.t)
        return normalize(weight_x * _unit(x) + weight_y * _unit(y), dim=2)


def _unit(x: Tensor) -> Tensor:
    """Directions, fp32 [kv_heads, tokens, dim]; a vector of zeros stays so."""
    return normalize(x.float(), dim=2)


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """Angles between vectors, 0 to pi, fp32 [kv_heads, tokens].

    By half-angle rather than arc cosine, which has no digits left near 0, where most pairs are.
    """
    x, y = _unit(x), _unit(y)
    return 2 * torch.atan2((x - y).norm(dim=2), (x + y).norm(dim=2))
