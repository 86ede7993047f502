"""The tasks by name: which puzzle, which of its questions, and where its facts lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tamis.bench.tasks.frequent import frequent_words
from tamis.bench.tasks.needle import multi_query, multi_value, needles
from tamis.bench.tasks.puzzle import Draw, Puzzle, Question
from tamis.bench.tasks.recall import key_values
from tamis.bench.tasks.variables import variable_traces

Fitting = Callable[[Sequence[str]], int]
"""How many lines like the given ones fill a document."""

_PROBE = 64  # pairs whose tokens say how many pairs fill a document
_MOST_PAIRS = 4000  # there are 4,096 keys


@dataclass(frozen=True)
class Scene:
    """What one document holds: facts at rising depths in [0, 1], and the questions asked."""

    puzzle: Puzzle
    asked: tuple[int, ...]
    depths: tuple[float, ...]

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(self.puzzle.questions[i] for i in self.asked)

    @property
    def question_depths(self) -> tuple[float, ...]:
        """Per question asked: the mean depth of the facts that it needs."""
        return tuple(
            float(np.mean([self.depths[fact] for fact in question.facts]))
            for question in self.questions
        )


Director = Callable[[Draw, float, Fitting], Scene]
"""Makes a scene; the depth is where the asked fact is to lie, in tasks that ask for one fact."""


def single(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """One needle."""
    return _one_at(draw, needles(draw, 1), depth)


def multi_key(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """One of sixteen needles."""
    return _one_at(draw, needles(draw, 16), depth)


def multi_value_task(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """All four values, numbered, of one of three keys."""
    return _scattered(draw, multi_value(draw, 3, 4, numbered=True))


def multi_value_unnumbered(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """All four values of one of three keys, told apart by their order alone."""
    return _scattered(draw, multi_value(draw, 3, 4, numbered=False))


def multi_query_task(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """Three of eight needles in one question."""
    return _scattered(draw, multi_query(draw, 8, 3))


def key_value(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """One pair of a document that is nothing but pairs."""
    probe = key_values(Draw(np.random.default_rng(0), draw.style), _PROBE)
    puzzle = key_values(draw, max(1, min(_MOST_PAIRS, fitting(probe.facts))))
    count = max(1, min(len(puzzle.facts), fitting(puzzle.facts)))
    puzzle = replace(puzzle, facts=puzzle.facts[:count], questions=puzzle.questions[:count])
    depths = ((np.arange(count) + 0.5) / count).tolist()
    return Scene(puzzle, (min(count - 1, int(depth * count)),), tuple(depths))


def variables(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """One of four chains of two assignments after the first."""
    return _scattered(draw, variable_traces(draw, 4, 2))


def frequent(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """The word that stands three times as often as each of four others in one of two lists."""
    return _scattered(draw, frequent_words(draw, 2, 12, distinct=5, ratio=3.0))


def multi_turn(draw: Draw, depth: float, fitting: Fitting) -> Scene:
    """Six questions, of three tasks, on one document of needles, pairs and variable traces."""
    parts = (needles(draw, 8), key_values(draw, 8), variable_traces(draw, 2, 2))
    puzzle = _merged(draw, parts)
    asked: list[int] = []
    start = 0
    for part, count in zip(parts, (3, 2, 1), strict=True):
        asked += [start + i for i in draw.shuffled(len(part.questions))[:count]]
        start += len(part.questions)
    return _scattered(draw, puzzle, [asked[i] for i in draw.shuffled(len(asked))])


TASKS: dict[str, Director] = {
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value_task,
    "multi_value_unnumbered": multi_value_unnumbered,
    "multi_query": multi_query_task,
    "key_value": key_value,
    "variables": variables,
    "frequent": frequent,
    "multi_turn": multi_turn,
}


def _scattered(draw: Draw, puzzle: Puzzle, asked: Sequence[int] = (0,)) -> Scene:
    depths = np.sort(draw.rng.random(len(puzzle.facts))).tolist()
    return Scene(puzzle, tuple(asked), tuple(depths))


def _one_at(draw: Draw, puzzle: Puzzle, depth: float) -> Scene:
    """One fact at `depth` and asked for, the others anywhere; question i must be about fact i."""
    depths = sorted([*draw.rng.random(len(puzzle.facts) - 1).tolist(), depth])
    return Scene(puzzle, (depths.index(depth),), tuple(depths))


def _merged(draw: Draw, parts: Sequence[Puzzle]) -> Puzzle:
    """Interleave the facts of puzzles, each in its own order; their questions follow each other."""
    sources = np.repeat(np.arange(len(parts)), [len(part.facts) for part in parts])
    sources = sources[draw.shuffled(len(sources))]
    queues = [iter(part.facts) for part in parts]
    facts = tuple(next(queues[which]) for which in sources.tolist())
    questions: list[Question] = []
    for which, part in enumerate(parts):
        places = np.flatnonzero(sources == which).tolist()
        questions += [
            replace(question, facts=tuple(places[fact] for fact in question.facts))
            for question in part.questions
        ]
    return Puzzle("multi_turn", facts, tuple(questions))
