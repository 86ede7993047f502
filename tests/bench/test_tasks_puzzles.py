"""The generators: facts and questions that fit each other."""

import numpy as np
import pytest

from tamis.bench.tasks.frequent import WORDS_PER_LINE, frequent_words
from tamis.bench.tasks.needle import multi_query, multi_value, needles
from tamis.bench.tasks.puzzle import Draw, Style
from tamis.bench.tasks.recall import key_values
from tamis.bench.tasks.variables import variable_traces
from tamis.bench.tasks.words import ADJECTIVES, NOUNS, VALUE_WORDS


def draw(seed=0, **style):
    return Draw(np.random.default_rng(seed), Style(**style))


def all_puzzles(make):
    return [
        needles(make(), 12),
        multi_query(make(), 9, 3),
        multi_value(make(), 4, 3, numbered=True),
        multi_value(make(), 4, 3, numbered=False),
        key_values(make(), 30),
        variable_traces(make(), 5, 2),
        frequent_words(make(), 3, 4, distinct=4, ratio=2.5),
    ]


def test_the_vocabularies_are_disjoint_and_large_enough():
    assert len(set(ADJECTIVES)) == len(set(NOUNS)) == 64
    assert len(set(VALUE_WORDS)) == len(VALUE_WORDS) >= 100
    assert not set(VALUE_WORDS) & (set(ADJECTIVES) | set(NOUNS))


@pytest.mark.parametrize("phrasing", ["restated", "natural"])
def test_prompts_stop_where_the_model_goes_on(phrasing):
    for puzzle in all_puzzles(lambda: draw(phrasings=(phrasing,))):
        for question in puzzle.questions:
            assert question.phrasing == phrasing
            assert question.prompt.startswith("Q: ")
            assert question.prompt.endswith(" A:") == (phrasing == "natural")
            assert question.answer.startswith(" ")
            assert "\n" not in question.prompt + question.answer


def test_needle_question_i_is_answered_by_fact_i():
    puzzle = needles(draw(), 12)
    for i, question in enumerate(puzzle.questions):
        (target,) = question.targets
        key = question.prompt.split("for ")[1].split("?")[0]
        assert question.facts == (i,)
        assert puzzle.facts[i] == f"The magic {question.kind} for {key} is {target}.\n"
        assert sum(f"for {key} is" in fact for fact in puzzle.facts) == 1


def test_kinds_decide_what_values_look_like():
    words = needles(draw(kinds=("word",)), 20)
    numbers = needles(draw(kinds=("number",), digits=(3, 7)), 50)
    assert all(question.targets[0] in VALUE_WORDS for question in words.questions)
    lengths = {len(question.targets[0]) for question in numbers.questions}
    assert all(question.targets[0].isdigit() for question in numbers.questions)
    assert lengths == {3, 4, 5, 6, 7}


def test_multi_query_answers_name_each_key_before_its_value():
    puzzle = multi_query(draw(phrasings=("natural",), kinds=("number",)), 9, 3)
    assert len(puzzle.questions) == 3
    for question in puzzle.questions:
        keys = question.prompt.split("for ")[1].split("?")[0].split(", ")
        pairs = zip(keys, question.targets, strict=True)
        assert question.answer == " " + ", ".join(f"{key} is {value}" for key, value in pairs)
        for key, value in zip(keys, question.targets, strict=True):
            assert f"The magic number for {key} is {value}.\n" in puzzle.facts


@pytest.mark.parametrize("numbered", [True, False])
def test_multi_value_answers_list_the_values_in_the_order_of_the_document(numbered):
    puzzle = multi_value(draw(phrasings=("restated",)), 4, 3, numbered=numbered)
    for question in puzzle.questions:
        key = question.prompt.split("for ")[1].split("?")[0]
        facts = [puzzle.facts[i] for i in question.facts]
        assert list(question.facts) == sorted(question.facts)
        assert [fact.split(" is ")[1] for fact in facts] == [t + ".\n" for t in question.targets]
        assert [f"{key} #{rank} is" in fact for rank, fact in enumerate(facts, 1)] == [numbered] * 3
        first, second, third = question.targets
        assert question.prompt.endswith(f"A: {key} #1 is")
        assert question.answer == f" {first}, {key} #2 is {second}, {key} #3 is {third}"


def test_variable_answers_trace_back_to_the_value():
    puzzle = variable_traces(draw(phrasings=("natural",)), 5, 3)
    left_to_right = dict(fact[4:-1].split(" = ") for fact in puzzle.facts)
    assert len(left_to_right) == 5 * 4
    for question in puzzle.questions:
        name = question.prompt.split("of ")[1].split("?")[0]
        trace = [name]
        while trace[-1] in left_to_right:
            trace.append(left_to_right[trace[-1]])
        assert question.answer == " " + " = ".join(trace)
        assert question.targets == (trace[-1],)
        assert len(trace) == 5


def test_a_variable_is_assigned_before_it_is_used():
    puzzle = variable_traces(draw(3), 6, 3)
    seen = set()
    for fact in puzzle.facts:
        name, right = fact[4:-1].split(" = ")
        assert right in seen or right.isdigit() or right in VALUE_WORDS
        seen.add(name)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_the_most_frequent_word_is_unique_and_as_frequent_as_asked(ratio):
    puzzle = frequent_words(draw(2), 3, 10, distinct=5, ratio=ratio)
    for question in puzzle.questions:
        words = [w for i in question.facts for w in puzzle.facts[i].split(": ")[1].split()]
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert len(words) == 10 * WORDS_PER_LINE
        assert len(counts) == 5
        assert counts[0][1] == question.targets[0]
        assert counts[0][0] > counts[1][0]
        assert counts[0][0] / counts[-1][0] == pytest.approx(ratio, rel=0.2)


def test_keys_and_variables_are_handed_out_once():
    one = draw()
    keys = one.keys(100) + one.keys(100)
    variables = one.variables(300) + one.variables(300)
    assert len(set(keys)) == 200
    assert len(set(variables)) == 600
    with pytest.raises(ValueError, match="at most 4096 keys"):
        one.keys(4000)


def test_a_seed_reproduces_a_puzzle_and_another_does_not():
    for first, again, other in zip(
        all_puzzles(draw), all_puzzles(draw), all_puzzles(lambda: draw(1)), strict=True
    ):
        assert first == again
        assert first != other


def test_recalled_parts_are_the_values_and_hops():
    trace = variable_traces(draw(phrasings=("restated",)), 1, 2).questions[0]
    assert [part.recalled for part in trace.parts] == [True, False, True, False, True]
    listed = multi_query(draw(phrasings=("natural",)), 4, 2).questions[0]
    assert [part.recalled for part in listed.parts] == [False, True, False, True]
