"""Which puzzles a training sequence holds, and how many facts each brings.

Every function draws a puzzle of roughly `budget` tokens (facts and questions together) from the
generators in `tamis.bench.tasks`, with random proportions, so that the model sees each task from a
few facts to a page full of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from tamis.bench.tasks.frequent import frequent_words
from tamis.bench.tasks.needle import multi_query, multi_value, needles
from tamis.bench.tasks.puzzle import Draw, Part, Puzzle, Question, recalled
from tamis.bench.tasks.recall import key_values
from tamis.bench.tasks.variables import variable_traces

# Tokens of one line with the reference tokenizer, questions included where it says so.
_NEEDLE, _PAIR, _PAIR_LINE, _NEEDLE_LINE, _WORD_LINE = 36, 28, 9, 14, 12


def _needle(draw: Draw, budget: int) -> Puzzle:
    return needles(draw, max(1, budget // _NEEDLE))


def _key_value(draw: Draw, budget: int) -> Puzzle:
    return key_values(draw, max(1, budget // _PAIR))


def _dense_key_value(draw: Draw, budget: int) -> Puzzle:
    """A page full of pairs, of which every fourth, drawn at random, is asked for."""
    puzzle = key_values(draw, max(2, min(2000, int(budget / (_PAIR_LINE + 0.25 * 22)))))
    asked = sorted(draw.shuffled(len(puzzle.facts))[: max(1, len(puzzle.facts) // 4)])
    return Puzzle("key_value", puzzle.facts, tuple(puzzle.questions[i] for i in asked))


def _multi_query(draw: Draw, budget: int) -> Puzzle:
    asked = int(draw.rng.integers(2, 5))
    return multi_query(draw, max(asked, budget // 28), asked)


def _multi_value(draw: Draw, budget: int) -> Puzzle:
    values = int(draw.rng.integers(2, 5))
    per_key = values * 16 + 20 + values * 10
    return multi_value(draw, max(1, budget // per_key), values, numbered=True)


def _multi_value_unnumbered(draw: Draw, budget: int) -> Puzzle:
    values = int(draw.rng.integers(2, 5))
    per_key = values * 14 + 20 + values * 10
    return multi_value(draw, max(1, budget // per_key), values, numbered=False)


def _variables(draw: Draw, budget: int) -> Puzzle:
    hops = int(draw.rng.integers(1, 4))
    per_chain = (hops + 1) * 7 + 24 + hops * 3
    return variable_traces(draw, max(1, min(budget // per_chain, 676 // (hops + 1))), hops)


def _frequent(draw: Draw, budget: int) -> Puzzle:
    distinct = int(draw.rng.integers(2, 8))
    lines = int(draw.rng.integers(2, max(3, min(24, budget // (2 * _WORD_LINE)))))
    lists = max(1, min(40, budget // (lines * _WORD_LINE + 22)))
    ratio = float(draw.rng.uniform(1.7, 4.0))
    return frequent_words(draw, lists, lines, distinct=distinct, ratio=ratio)


def _recital(draw: Draw, budget: int) -> Puzzle:
    """Facts that are told again, word for word: the plainest look-up, and the most of it per token.

    It brings about the retrieval transition; the questions of the tasks are too sparse for that.
    """
    if draw.rng.random() < 0.7:
        puzzle = key_values(draw, max(1, budget // (3 * _PAIR_LINE)))
    else:
        puzzle = needles(draw, max(1, budget // (3 * _NEEDLE_LINE)))
    retold = [
        _retold(fact, question)
        for fact, question in zip(puzzle.facts, puzzle.questions, strict=True)
    ]
    return Puzzle("recital", puzzle.facts, (*retold, *retold))


def _retold(fact: str, question: Question) -> Question:
    (target,) = question.targets
    opening, rest = fact.rstrip("\n").rsplit(f" {target}", 1)
    parts = [recalled(target)] + ([Part(rest, recalled=False)] if rest else [])
    return replace(question, prompt=opening, parts=tuple(parts))


INGREDIENTS: Mapping[str, Callable[[Draw, int], Puzzle]] = {
    "needle": _needle,
    "key_value": _key_value,
    "dense_key_value": _dense_key_value,
    "multi_query": _multi_query,
    "multi_value": _multi_value,
    "multi_value_unnumbered": _multi_value_unnumbered,
    "variables": _variables,
    "frequent": _frequent,
    "recital": _recital,
}
