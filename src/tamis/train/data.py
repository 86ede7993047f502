"""Training sequences: puzzles hidden in library text, with many questions each.

A sequence is composed from token arrays, line by line; the tokenizer's lines compose, so the result
is what tokenizing the whole text would give. A batch is a pure function of (recipe, seed, step),
so a resumed run goes on with the batches that an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from tamis.bench.tasks.puzzle import Draw, Puzzle, Question, Style
from tamis.train.mixture import INGREDIENTS
from tamis.train.text import BOS, TokenText

# What a target token is, for the loss and the curves.
NO_LOSS, TEXT, ANSWER, FIRST = 0, 1, 2, 3

_ORDINARY = 259  # the first token that is neither special nor a single byte

TRAINING_STYLE = Style(digits=(3, 7))


@dataclass(frozen=True)
class Blend:
    """What the sequences of a stage are made of.

    weights: how often each ingredient is drawn; "text" is a sequence without puzzle.
    density: bounds of the share of a sequence that facts and questions take.
    stretch: the largest position id that position jumps may reach (PoSE).
    noise: the share of sequences whose facts lie in random tokens instead of library text.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    density: tuple[float, float] = (0.3, 0.9)
    stretch: int = 16384
    noise: float = 0.1


@dataclass(frozen=True)
class Batch:
    """tokens, positions [batch, length] int64; the positions with loss and their targets:
    where, targets, classes [batch, selected] int64; tasks: the puzzle behind each target, as an
    index into `names` [batch, selected] int64."""

    tokens: np.ndarray
    positions: np.ndarray
    where: np.ndarray
    targets: np.ndarray
    classes: np.ndarray
    tasks: np.ndarray
    names: tuple[str, ...]


TASK_NAMES: tuple[str, ...] = (
    "text",
    "needle",
    "key_value",
    "multi_query",
    "multi_value",
    "multi_value_unnumbered",
    "variables",
    "frequent",
    "recital",
)


@dataclass
class _Line:
    """Tokens with the class of each as a target."""

    tokens: list[int]
    classes: list[int]
    task: int
    after: int = -1  # for questions: the index of the last fact needed


class Composer:
    """Composes training sequences over one token text, with the tokenizer that made it."""

    def __init__(self, text: TokenText, tokenizer: Tokenizer) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._bos = tokenizer.token_to_id(BOS)
        self._newline = text.newline

    def batch(self, blend: Blend, seed: int, step: int, size: int, length: int) -> Batch:
        """The batch of one step: `size` sequences, half of their `length` tokens selected."""
        rng = np.random.default_rng([seed, step, length])
        selected = max(1, length // 2)
        shape = (size, selected)
        tokens = np.zeros((size, length), np.int64)
        positions = np.zeros((size, length), np.int64)
        where, targets, classes, tasks = (np.zeros(shape, np.int64) for _ in range(4))
        for row in range(size):
            line, cuts = self.sequence(rng, blend, length)
            ids, kinds, owners = line
            tokens[row] = ids
            positions[row] = stretched_positions(rng, length, cuts, blend.stretch)
            chosen = _select(rng, kinds[1:], selected)
            count = len(chosen)
            where[row, :count] = chosen
            targets[row, :count] = ids[chosen + 1]
            classes[row, :count] = kinds[chosen + 1]
            tasks[row, :count] = owners[chosen + 1]
        return Batch(tokens, positions, where, targets, classes, tasks, TASK_NAMES)

    def sequence(
        self, rng: np.random.Generator, blend: Blend, length: int
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[int]]:
        """One sequence of exactly `length` tokens.

        Returns (tokens, classes, tasks), each [length] int64, and the indices of the line starts at
        which positions may jump.
        """
        names = list(blend.weights)
        weights = np.asarray([blend.weights[name] for name in names])
        facts: list[_Line] = []
        questions: list[_Line] = []
        draw = Draw(rng, TRAINING_STYLE)
        picks = rng.choice(len(names), size=int(rng.integers(1, 3)), p=weights / weights.sum())
        picked = [names[i] for i in dict.fromkeys(picks.tolist()) if names[i] != "text"]
        density = 0.97 if picked == ["dense_key_value"] else rng.uniform(*blend.density)
        budget = int(length * density)
        for name in picked:
            puzzle = INGREDIENTS[name](draw, budget // len(picked))
            self._merge(rng, facts, questions, self._encoded(puzzle))
        self._trim(rng, facts, questions, length - 2)
        return self._assemble(rng, facts, questions, length, blend.noise)

    def _encoded(self, puzzle: Puzzle) -> tuple[list[_Line], list[_Line]]:
        task = TASK_NAMES.index(puzzle.task)
        facts = [
            _Line(encoded.ids, [NO_LOSS] * len(encoded.ids), task)
            for encoded in self._tokenizer.encode_batch(
                list(puzzle.facts), add_special_tokens=False
            )
        ]
        return facts, [self._question(question, task) for question in puzzle.questions]

    def _question(self, question: Question, task: int) -> _Line:
        texts = [question.prompt, *(part.text for part in question.parts)]
        prompt, *parts = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        tokens, classes = list(prompt.ids), [NO_LOSS] * len(prompt.ids)
        for part, encoded in zip(question.parts, parts, strict=True):
            tokens += encoded.ids
            first = FIRST if part.recalled else ANSWER
            classes += [first] + [ANSWER] * (len(encoded.ids) - 1)
        return _Line([*tokens, self._newline], [*classes, ANSWER], task, max(question.facts))

    @staticmethod
    def _merge(
        rng: np.random.Generator,
        facts: list[_Line],
        questions: list[_Line],
        more: tuple[list[_Line], list[_Line]],
    ) -> None:
        """Interleave the facts of another puzzle, keeping each puzzle's order; move questions."""
        new_facts, new_questions = more
        source = np.repeat([0, 1], [len(facts), len(new_facts)])[
            rng.permutation(len(facts) + len(new_facts))
        ]
        places = [np.flatnonzero(source == which).tolist() for which in (0, 1)]
        for question in questions:
            question.after = places[0][question.after]
        for question in new_questions:
            question.after = places[1][question.after]
        queues = (iter(list(facts)), iter(new_facts))
        facts[:] = [next(queues[which]) for which in source]
        questions += new_questions

    @staticmethod
    def _trim(
        rng: np.random.Generator, facts: list[_Line], questions: list[_Line], room: int
    ) -> None:
        """Drop questions at random, then whole puzzles, until all fits into `room` tokens."""
        order = rng.permutation(len(questions))
        questions[:] = [questions[i] for i in order]
        used = sum(len(line.tokens) for line in (*facts, *questions))
        while used > room and questions:
            used -= len(questions.pop().tokens)
        if used > room:
            facts.clear()

    def _assemble(
        self,
        rng: np.random.Generator,
        facts: list[_Line],
        questions: list[_Line],
        length: int,
        noise: float,
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[int]]:
        used = 1 + sum(len(line.tokens) for line in (*facts, *questions))
        filler = self._text.window(rng, length - used)
        ends = np.concatenate([[0], np.flatnonzero(filler == self._newline) + 1])
        depths = np.sort(rng.random(len(facts))) * len(filler)
        places = ends[np.searchsorted(ends, depths, side="right") - 1]
        interleaved: dict[int, list[_Line]] = {}
        last: list[_Line] = []
        mixing = rng.random() < 0.5
        for question in questions:
            if mixing and rng.random() < 0.7:
                at = int(rng.integers(question.after, len(facts)))
                interleaved.setdefault(at, []).append(question)
            else:
                last.append(question)
        trained = TEXT if rng.random() >= noise or not facts else NO_LOSS
        if trained == NO_LOSS:
            filler = self._noise(rng, filler)
        pieces: list[tuple[np.ndarray | list[int], np.ndarray | list[int], int]] = []
        cuts: list[int] = []
        size = 1

        def add(tokens: np.ndarray | list[int], classes: np.ndarray | list[int], task: int) -> None:
            nonlocal size
            cuts.append(size)
            pieces.append((tokens, classes, task))
            size += len(tokens)

        done = 0
        for i, (fact, place) in enumerate(zip(facts, places.tolist(), strict=True)):
            if place > done:
                add(filler[done:place], np.full(place - done, trained), 0)
                done = place
            add(fact.tokens, fact.classes, fact.task)
            for question in interleaved.get(i, ()):
                add(question.tokens, question.classes, question.task)
        if done < len(filler):
            add(filler[done:], np.full(len(filler) - done, trained), 0)
        for question in last:
            add(question.tokens, question.classes, question.task)
        tokens = np.concatenate([[self._bos], *(piece[0] for piece in pieces)])
        classes = np.concatenate([[NO_LOSS], *(piece[1] for piece in pieces)])
        tasks = np.concatenate([[0], *(np.full(len(piece[0]), piece[2]) for piece in pieces)])
        return (tokens, classes, tasks), cuts

    def _noise(self, rng: np.random.Generator, filler: np.ndarray) -> np.ndarray:
        """Replace the text between line ends by random tokens: facts must be found in any text."""
        noise = rng.integers(_ORDINARY, self._tokenizer.get_vocab_size(), len(filler))
        return np.where(filler == self._newline, filler, noise)


def stretched_positions(
    rng: np.random.Generator, length: int, cuts: list[int], limit: int
) -> np.ndarray:
    """Positions [length] with up to three jumps at `cuts`, in half of the cases (PoSE).

    The jumps add up to a log-uniform total below `limit - length`, so short sequences train
    attention over long distances.
    """
    positions = np.arange(length)
    if limit - length <= 64 or not cuts or rng.random() < 0.5:
        return positions
    total = math.exp(rng.uniform(math.log(64), math.log(limit - length)))
    shares = rng.dirichlet(np.ones(int(rng.integers(1, 4))))
    for share in shares:
        positions[cuts[int(rng.integers(len(cuts)))] :] += int(share * total)
    return positions


def _select(rng: np.random.Generator, classes: np.ndarray, count: int) -> np.ndarray:
    """At most `count` sorted positions whose next token has a loss: answers before text."""
    answers = np.flatnonzero(classes >= ANSWER)
    text = np.flatnonzero(classes == TEXT)
    if len(answers) >= count:
        return np.sort(rng.permutation(answers)[:count])
    return np.sort(np.concatenate([answers, rng.permutation(text)[: count - len(answers)]]))
