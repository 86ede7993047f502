"""Where a run stands: in its budget, in its curriculum, and on its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tamis.train.recipe import Recipe, Stage

_LONGEST_STEP = 60.0  # seconds; a step that took longer was paused, and the pause is not counted
_MEMORY = 0.97  # of the running accuracies, per step


@dataclass
class Clock:
    """Counts steps and active time, and moves from stage to stage."""

    recipe: Recipe
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    stage_index: int = 0
    stage_began: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_index]

    @property
    def progress(self) -> float:
        """The part of the budget that is used, from 0 to 1."""
        if self.recipe.steps is not None:
            return min(1.0, self.step / self.recipe.steps)
        assert self.recipe.minutes is not None
        return min(1.0, self.seconds / 60 / self.recipe.minutes)

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    @property
    def stage_ends(self) -> float:
        """The progress at which the current stage is left at the latest."""
        left = [stage.share for stage in self.recipe.stages[self.stage_index :]]
        return self.stage_began + (1 - self.stage_began) * left[0] / sum(left)

    @property
    def lr_scale(self) -> float:
        """Warm-up, constant, then a linear fall to 2 %."""
        rise = min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        fall = min(1.0, (1 - self.progress) / self.recipe.decay) if self.recipe.decay else 1.0
        return rise * max(0.02, fall)

    def advance(self, seconds: float, accuracies: Mapping[str, float]) -> bool:
        """Count one step and its first-answer-token accuracies; True when a new stage begins."""
        self.step += 1
        self.seconds += min(seconds, _LONGEST_STEP)
        self.tokens += self.stage.length * self.stage.batch
        for task, value in accuracies.items():
            before = self.accuracy.get(task, value)
            self.accuracy[task] = _MEMORY * before + (1 - _MEMORY) * value
        last = self.stage_index == len(self.recipe.stages) - 1
        if last or not (self.progress >= self.stage_ends or self._passed()):
            return False
        self.stage_index += 1
        self.stage_began = self.progress
        self.accuracy.clear()
        return True

    def _passed(self) -> bool:
        gate = self.stage.gate
        if gate is None:
            return False
        return all(self.accuracy.get(task, 0.0) >= gate for task in self.stage.gated)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "stage_index": self.stage_index,
            "stage_began": self.stage_began,
            "accuracy": dict(self.accuracy),
        }
