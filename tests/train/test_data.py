"""Training sequences: composed as text would be tokenized, labelled where the answers are."""

import numpy as np
import pytest

from tamis.train.data import (
    ANSWER,
    FIRST,
    NO_LOSS,
    TASK_NAMES,
    TEXT,
    Blend,
    Composer,
    stretched_positions,
)
from tamis.train.mixture import INGREDIENTS
from tamis.train.recipe import cpu_recipe


@pytest.fixture(scope="module")
def composer(text, tokenizer):
    return Composer(text, tokenizer.backend_tokenizer)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("ingredient", INGREDIENTS)
@pytest.mark.parametrize("length", [256, 1024])
def test_sequences_have_their_length_and_answers_after_their_facts(
    ingredient, length, composer, text
):
    answers = 0
    for seed in range(6):
        blend = Blend({ingredient: 1.0}, (0.4, 0.9))
        (tokens, classes, tasks), cuts = composer.sequence(rng(seed), blend, length)
        assert len(tokens) == len(classes) == len(tasks) == length
        assert all(tokens[cut - 1] == text.newline for cut in cuts[1:])
        answers += int((classes == FIRST).sum())
        assert (classes[tasks == 0] < ANSWER).all()
    assert answers > 0


def test_every_recalled_value_stands_in_the_text_before_its_question(composer, tokenizer, text):
    for seed in range(8):
        blend = Blend({"key_value": 1.0}, (0.8, 0.9))
        (tokens, classes, _), _ = composer.sequence(rng(seed), blend, 512)
        firsts = np.flatnonzero(classes == FIRST)
        for first in firsts:
            end = first
            while tokens[end] != text.newline:
                end += 1
            value = tokenizer.decode(tokens[first:end])
            earlier = tokenizer.decode(tokens[1:first])
            question = earlier.rsplit("Q: What is key ", 1)[1]
            key = question.split("?")[0]
            assert f"key {key} ={value}\n" in earlier


def test_composed_tokens_are_what_tokenizing_the_text_gives(composer, tokenizer, text):
    blend = Blend(dict.fromkeys(INGREDIENTS, 1.0), (0.4, 0.9), noise=0.0)
    for seed in range(30):
        (tokens, _, _), _ = composer.sequence(rng(seed), blend, 512)
        ends = np.flatnonzero(tokens == text.newline) + 1
        differing = 0
        for line in np.split(tokens[1:], ends - 1):
            again = tokenizer.encode(tokenizer.decode(line), add_special_tokens=False)
            differing += again != line.tolist()
        assert differing <= 1  # the line at which the library text was cut


def test_noise_replaces_the_text_and_is_not_learned(composer):
    blend = Blend({"needle": 1.0}, (0.3, 0.3), noise=1.0)
    (_, classes, _), _ = composer.sequence(rng(), blend, 512)
    quiet = Blend({"needle": 1.0}, (0.3, 0.3), noise=0.0)
    (_, plain_classes, _), _ = composer.sequence(rng(), quiet, 512)
    assert not (classes == TEXT).any()
    assert (plain_classes == TEXT).sum() > 200
    assert (classes >= ANSWER).sum() == (plain_classes >= ANSWER).sum() > 0


def test_a_batch_is_a_function_of_seed_and_step(composer):
    blend = cpu_recipe(steps=1).stages[0].blend
    first, again = (composer.batch(blend, 1, 5, 4, 256) for _ in range(2))
    other = composer.batch(blend, 1, 6, 4, 256)
    for name in ("tokens", "positions", "where", "targets", "classes", "tasks"):
        assert (getattr(first, name) == getattr(again, name)).all()
    assert (first.tokens != other.tokens).any()


def test_targets_are_the_tokens_after_the_selected_positions(composer):
    batch = composer.batch(cpu_recipe(steps=1).stages[1].blend, 0, 0, 4, 256)
    assert batch.where.shape == batch.targets.shape == (4, 128)
    for row in range(4):
        chosen = batch.classes[row] != NO_LOSS
        where = batch.where[row][chosen]
        assert (batch.targets[row][chosen] == batch.tokens[row][where + 1]).all()
        assert (np.diff(where) > 0).all()
    assert {TASK_NAMES[i] for i in np.unique(batch.tasks[batch.classes >= ANSWER])} - {"text"}


def test_positions_jump_at_line_starts_only_and_stay_below_the_limit():
    jumped = 0
    for seed in range(200):
        positions = stretched_positions(rng(seed), 128, [10, 50, 90], 4096)
        steps = np.diff(positions)
        places = set((np.flatnonzero(steps != 1) + 1).tolist())
        assert places <= {10, 50, 90}
        assert (steps >= 1).all()
        assert positions[0] == 0
        assert positions[-1] < 4096
        jumped += bool(places)
    assert 60 < jumped < 140
    assert (stretched_positions(rng(), 128, [10], 128) == np.arange(128)).all()
