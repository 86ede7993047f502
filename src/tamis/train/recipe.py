"""The recipe of the reference model: sizes, stages and settings, for a CPU and for a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tamis.train.data import Blend


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the vocabulary is the tokenizer's."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 640
    max_position: int = 32768
    rope_theta: float = 1e6


@dataclass(frozen=True)
class Stage:
    """One step of the length curriculum.

    share: the largest part of the whole budget that the stage may take.
    gate: the stage is left earlier once every task in `gated` has this first-answer-token
    accuracy; None keeps it for its whole share. What an early stage leaves over goes to the later
    ones in proportion to their shares.
    """

    length: int
    batch: int
    share: float
    blend: Blend
    gate: float | None = None
    gated: tuple[str, ...] = ("needle", "key_value")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the parameters, but the machine's rounding and its speed.

    Exactly one of `minutes` (of active training) and `steps` is the budget. The learning rates stay
    constant after `warmup` steps until the last `decay` of the budget, then fall linearly.
    """

    shape: Shape
    stages: tuple[Stage, ...]
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup: int = 40
    decay: float = 0.3
    text_weight: float = 0.5
    first_weight: float = 4.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("a recipe has either minutes or steps as its budget")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_SHORT = {
    "recital": 0.08,
    "needle": 0.20,
    "key_value": 0.14,
    "dense_key_value": 0.08,
    "multi_query": 0.08,
    "multi_value": 0.10,
    "multi_value_unnumbered": 0.06,
    "variables": 0.12,
    "frequent": 0.12,
    "text": 0.12,
}

_LONG = {
    "needle": 0.18,
    "key_value": 0.06,
    "dense_key_value": 0.12,
    "multi_query": 0.08,
    "multi_value": 0.10,
    "multi_value_unnumbered": 0.06,
    "variables": 0.12,
    "frequent": 0.14,
    "text": 0.18,
}

_LOOK_UPS = ("needle", "key_value", "multi_query", "multi_value", "variables")


def cpu_recipe(*, minutes: float | None = None, steps: int | None = None, seed: int = 0) -> Recipe:
    """About 4 million parameters; an hour or two on two cores.

    4,096 tokens per step until looking-up works, then 8,192.
    """
    if minutes is None and steps is None:
        minutes = 80.0
    stages = (
        Stage(256, 16, 0.10, Blend(_SHORT, (0.5, 0.95)), gate=0.90, gated=_LOOK_UPS),
        Stage(512, 16, 0.25, Blend(_SHORT, (0.4, 0.95))),
        Stage(1024, 8, 0.20, Blend(_LONG, (0.25, 0.8), stretch=32768)),
        Stage(2048, 4, 0.18, Blend(_LONG, (0.12, 0.6), stretch=32768)),
        Stage(4096, 2, 0.17, Blend(_LONG, (0.06, 0.4), stretch=32768)),
        Stage(8192, 1, 0.10, Blend(_LONG, (0.04, 0.3), stretch=32768)),
    )
    return Recipe(Shape(), stages, minutes=minutes, steps=steps, seed=seed)


def gpu_recipe(*, minutes: float | None = None, steps: int | None = None, seed: int = 0) -> Recipe:
    """About 25 million parameters, lengths to 16k; tens of minutes on one data-center GPU."""
    if minutes is None and steps is None:
        minutes = 30.0
    shape = Shape(layers=8, hidden=512, heads=8, kv_heads=2, head_dim=64, feed_forward=1408)
    stages = (
        Stage(256, 64, 0.05, Blend(_SHORT, (0.5, 0.95)), gate=0.95, gated=_LOOK_UPS),
        Stage(512, 64, 0.20, Blend(_SHORT, (0.4, 0.95))),
        Stage(1024, 64, 0.20, Blend(_LONG, (0.25, 0.8), stretch=32768)),
        Stage(4096, 32, 0.30, Blend(_LONG, (0.06, 0.4), stretch=32768)),
        Stage(16384, 8, 0.25, Blend(_LONG, (0.02, 0.2), stretch=32768)),
    )
    return Recipe(shape, stages, minutes=minutes, steps=steps, seed=seed, matrix_lr=0.01)
