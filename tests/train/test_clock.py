"""Budgets, gates and learning rates."""

from dataclasses import replace

import pytest

from tamis.train.clock import Clock
from tamis.train.data import Blend
from tamis.train.mixture import INGREDIENTS
from tamis.train.recipe import Recipe, Shape, Stage, cpu_recipe, gpu_recipe

STAGES = (
    Stage(128, 2, 0.5, Blend(), gate=0.9, gated=("needle",)),
    Stage(256, 1, 0.25, Blend()),
    Stage(512, 1, 0.25, Blend()),
)
RECIPE = Recipe(Shape(), STAGES, steps=100, warmup=10, decay=0.25)


def walk(clock, steps, accuracy=0.0):
    return [clock.advance(1.0, {"needle": accuracy}) for _ in range(steps)]


def test_without_the_gate_every_stage_takes_its_share():
    clock = Clock(RECIPE)
    moves = walk(clock, 100)
    assert [i + 1 for i, moved in enumerate(moves) if moved] == [50, 75]
    assert clock.done
    assert clock.tokens == 50 * 256 + 25 * 256 + 25 * 512


def test_a_passed_gate_leaves_its_time_to_the_later_stages():
    clock = Clock(RECIPE)
    moves = walk(clock, 20, accuracy=1.0)
    assert moves[0]
    assert clock.stage.length == 256
    assert clock.stage_ends == pytest.approx(0.01 + 0.99 / 2)


def test_the_gate_waits_for_a_lasting_accuracy():
    clock = Clock(RECIPE)
    walk(clock, 10, accuracy=0.0)
    moves = walk(clock, 90, accuracy=1.0)
    first = moves.index(True) + 1
    assert 1 - 0.97**first >= 0.9 > 1 - 0.97 ** (first - 1) or first == 40


def test_the_rate_warms_up_stays_and_falls():
    clock = Clock(RECIPE)
    scales = []
    for _ in range(100):
        scales.append(clock.lr_scale)
        clock.advance(1.0, {})
    assert scales[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert scales[10:75] == [1.0] * 65
    assert scales[87] == pytest.approx((1 - 0.87) / 0.25)
    assert scales[-1] == pytest.approx(0.04)


def test_a_pause_is_not_training_time():
    clock = Clock(replace(RECIPE, steps=None, minutes=10.0))
    clock.advance(3.0, {})
    clock.advance(4000.0, {})
    assert clock.seconds == 63.0
    assert clock.progress == pytest.approx(63 / 600)


def test_a_saved_clock_goes_on_as_before():
    clock = Clock(RECIPE)
    walk(clock, 60, accuracy=0.3)
    again = Clock(RECIPE, **clock.state())
    assert walk(clock, 40, 0.3) == walk(again, 40, 0.3)
    assert clock.state() == again.state()


@pytest.mark.parametrize("budget", [{}, {"minutes": 1.0, "steps": 5}])
def test_a_recipe_has_one_budget(budget):
    with pytest.raises(ValueError, match="either minutes or steps"):
        Recipe(Shape(), STAGES, **budget)


@pytest.mark.parametrize("recipe", [cpu_recipe(steps=1), gpu_recipe(steps=1)])
def test_shipped_recipes_are_consistent(recipe):
    assert sum(stage.share for stage in recipe.stages) == pytest.approx(1.0)
    lengths = [stage.length for stage in recipe.stages]
    assert lengths == sorted(lengths)
    for stage in recipe.stages:
        assert stage.blend.stretch <= recipe.shape.max_position
        assert set(stage.blend.weights) <= {"text", *INGREDIENTS}
