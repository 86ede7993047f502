"""What counts as right."""

from __future__ import annotations

import pytest

from tamis import LLM
from tamis.bench.exercise import Exercise, exercises_of, targets_found
from tamis.bench.tasks.samples import Suite, make_samples


@pytest.mark.parametrize(
    ("said", "targets", "score"),
    [
        (" 48392", ["48392"], 1),
        (" 48392.", ["48392"], 1),
        ("The number is 48392!", ["48392"], 1),
        (" 483921", ["48392"], 0),
        (" pineapple", ["apple"], 0),
        ("", ["apple"], 0),
        (" 1, b #2 is 2, b #3 is 3", ["1", "2", "3"], 1),
        (" 11, 22", ["11", "33", "22"], 2 / 3),
        (" 22 and 11", ["11", "22"], 1 / 2),  # 22 is not said after 11
        (" 7 7", ["7", "7"], 1),
        (" 7", ["7", "7"], 1 / 2),
        (" c++ (x)", ["c++", "(x)"], 1),
    ],
)
def test_the_score_is_the_share_of_targets_said_as_words_in_order(
    said: str, targets: list[str], score: float
) -> None:
    assert targets_found(said, targets) == pytest.approx(score)


def test_an_exact_answer_is_a_right_one_and_nothing_else() -> None:
    exercise = Exercise("t", None, 0, 0, "Q", (" two words", "2"), lambda said: 0.0)
    assert exercise.is_exact(" two  words\n")
    assert exercise.is_exact("2")
    assert not exercise.is_exact("two words.")
    assert not exercise.is_exact("")


def test_every_question_is_an_exercise_on_the_document_alone(llm: LLM) -> None:
    samples = make_samples(Suite("multi_turn", 900, 2, seed=3), llm)
    exercises = list(exercises_of(samples))

    assert [(e.sample, e.question) for e in exercises] == [(s, q) for s in (0, 1) for q in range(6)]
    for exercise in exercises:
        sample = samples[exercise.sample]
        question = sample.questions[exercise.question]
        assert exercise.text == sample.document + question.prompt
        assert exercise.score(question.answer) == 1
        assert exercise.is_exact(question.answer)
        assert exercise.depth == sample.depths[exercise.question]
        assert (exercise.kind, exercise.phrasing) == (question.kind, question.phrasing)


def test_answers_may_be_some_tokens_longer_than_the_longest_right_one() -> None:
    exercise = Exercise("t", None, 0, 0, "Q", ("a b", "a b c"), lambda said: 0.0)
    assert exercise.answer_tokens(lambda text: len(text.split())) == 3 + 16


def test_prompts_are_told_apart_by_their_digests() -> None:
    one, other = (Exercise("t", None, 0, 0, text, ("a",), lambda said: 0.0) for text in "QR")
    assert one.digest != other.digest
    assert len(one.digest) == 12
