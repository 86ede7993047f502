"""Moving keys that RoPE has rotated to other positions.

RoPE (arXiv 2104.09864, equation 15) turns each pair of a key's elements by its position times the
pair's frequency, so a key moves from position p to p + d by being turned d times further. Models
differ in their frequencies, in which elements are pairs and in how many are rotated, and no
configuration says all of it. So the frequencies are taken from the rotary module's own forward,
and the layout is the one that maps the keys of one probe to those of another at other positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import UnsupportedModelError
from tamis.model.rotate import rotate

REACH = 512
"""Probes stay below this position, and go far enough for slow frequencies to show."""


@dataclass(frozen=True, eq=False)
class RotaryCall:
    """A rotary module, and what the model calls it with beside positions."""

    module: nn.Module
    arguments: dict[str, Any]

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, fp32 [tokens, columns], at `positions` int64 [tokens]."""
        cos, sin = self.module(**self.arguments, position_ids=positions[None])
        return cos[0], sin[0]


@dataclass(frozen=True)
class Rotation:
    """How the keys of a layer are rotated.

    Attributes:
        rotary: gives the layer's cosines and sines.
        columns: where in their last dimension each frequency stands once.
        interleaved: pairs are elements (2i, 2i + 1) as in GPT-J, not (i, i + n/2) as in GPT-NeoX.
    """

    rotary: RotaryCall
    columns: slice
    interleaved: bool

    def shift(self, k: Tensor, delta: Tensor) -> Tensor:
        """Keys [..., tokens, k_dim] turned by `delta` int64 [tokens] positions, in fp32 inside."""
        # Few tokens move by distances of their own, and angles cost more than what they turn.
        steps, angle = torch.unique(delta, return_inverse=True)
        at = torch.cat([steps.new_zeros(1), steps.abs()])
        cos, sin = (part[:, self.columns] for part in self.rotary(at))  # [1 + steps, pairs]
        # At position 0 the cosine is 1, times the factor by which YaRN scales attention.
        cos, sin = cos[1:] / cos[:1], sin[1:] / cos[:1] * steps.sign()[:, None]
        return rotate(k, cos, sin, angle, interleaved=self.interleaved)


@contextmanager
def rotary_calls(modules: Sequence[nn.Module]) -> Iterator[list[RotaryCall]]:
    """Within the context, every call of one of the rotary `modules` is noted in the list."""
    calls: list[RotaryCall] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        arguments.pop("position_ids")
        # Results come in the dtype of the activations, whose values do not matter.
        single = {
            name: value.new_zeros(1, dtype=torch.float32) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        if isinstance(output, tuple):  # cosine and sine; a complex tensor is another convention
            calls.append(RotaryCall(module, single))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
        yield calls


def find_rotations(
    keys: Sequence[Tensor], moved: Sequence[Tensor], delta: Tensor, calls: Sequence[RotaryCall]
) -> tuple[Rotation | None, ...]:
    """How each layer rotates its keys; None for a layer that does not.

    Args:
        keys: [tokens, kv_heads, k_dim] of each layer.
        moved: the same tokens' keys when all are `delta` positions further.
        delta: int64 [tokens].
        calls: the model's calls of its rotary modules.

    Raises:
        UnsupportedModelError: no rotation maps the keys of a layer to those moved.
    """
    # Rotated keys carry the rounding of cosines and sines; a wrong layout is wrong by about 1.
    tolerance = 1e-3 if keys[0].dtype.itemsize >= 4 else 3e-2
    found: list[Rotation | None] = []
    for layer, (before, after) in enumerate(zip(keys, moved, strict=True)):
        k, goal = before.transpose(0, 1), after.transpose(0, 1)  # [kv_heads, tokens, k_dim]
        candidates: list[Rotation | None] = [None, *_candidates(calls, delta, k.shape[-1])]
        errors = [
            float((goal.float() - (k if one is None else one.shift(k, delta)).float()).norm())
            for one in candidates
        ]
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] > tolerance * float(goal.float().norm()):
            raise UnsupportedModelError(
                f"in layer {layer}, what a position does to a key is not a rotation that can be "
                "continued"
            )
        found.append(candidates[best])
    return tuple(found)


def _candidates(calls: Sequence[RotaryCall], delta: Tensor, k_dim: int) -> Iterator[Rotation]:
    """Every way in which one of `calls` may rotate keys of `k_dim` elements."""
    for call in calls:
        width = call(delta[:1])[0].shape[-1]
        # Cosines stand there twice, one half after the other or side by side, or only once.
        for columns in (slice(0, width // 2), slice(0, width, 2), slice(0, width)):
            if 2 * len(range(width)[columns]) <= k_dim:
                for interleaved in (False, True):
                    yield Rotation(call, columns, interleaved)
