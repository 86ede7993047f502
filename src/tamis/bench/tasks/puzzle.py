"""What a task is before it is hidden in text: facts, and questions about them.

A *puzzle* knows nothing of tokens or of the text around it. The composer (`compose.py`) hides its
facts in a haystack for evaluation; training (`tamis.train.data`) draws the same puzzles, so a model
is trained on exactly the lines that it is later asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tamis.bench.tasks.words import ADJECTIVES, NOUNS, VALUE_WORDS

Kind = Literal["word", "number"]
Phrasing = Literal["restated", "natural"]

KINDS: tuple[Kind, ...] = ("word", "number")
PHRASINGS: tuple[Phrasing, ...] = ("restated", "natural")

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Part:
    """A piece of an answer; `recalled` pieces must be found in the document, others are glue."""

    text: str
    recalled: bool


@dataclass(frozen=True)
class Question:
    """One question. `prompt` ends where the model goes on; `answer` begins with a space.

    `targets` are the strings a right answer contains, in order. `facts` are the indices of the
    fact lines that it takes to answer.
    """

    prompt: str
    parts: tuple[Part, ...]
    targets: tuple[str, ...]
    facts: tuple[int, ...]
    kind: Kind
    phrasing: Phrasing

    @property
    def answer(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Puzzle:
    """Fact lines (each ends with a newline) in the order in which they must appear."""

    task: str
    facts: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Style:
    """Which kinds of values and phrasings may occur, and how many digits numbers have."""

    kinds: tuple[Kind, ...] = KINDS
    phrasings: tuple[Phrasing, ...] = PHRASINGS
    digits: tuple[int, int] = (5, 5)


class Draw:
    """Draws names and values at random; no key and no variable is handed out twice."""

    def __init__(self, rng: np.random.Generator, style: Style | None = None) -> None:
        self.rng = rng
        self.style = style or Style()
        self._keys = rng.permutation(len(ADJECTIVES) * len(NOUNS)).tolist()
        self._variables = rng.permutation(len(_LETTERS) ** 2).tolist()

    def keys(self, count: int) -> list[str]:
        """`count` unused keys such as ``amber-falcon``; all adjectives and nouns equally likely."""
        taken, self._keys = self._keys[:count], self._keys[count:]
        if len(taken) < count:
            raise ValueError(f"a document holds at most {len(ADJECTIVES) * len(NOUNS)} keys")
        return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in taken]

    def variables(self, count: int) -> list[str]:
        """`count` unused variable names of two capital letters."""
        taken, self._variables = self._variables[:count], self._variables[count:]
        if len(taken) < count:
            raise ValueError(f"a document holds at most {len(_LETTERS) ** 2} variables")
        return [_LETTERS[i // len(_LETTERS)] + _LETTERS[i % len(_LETTERS)] for i in taken]

    def kind(self) -> Kind:
        return self.style.kinds[int(self.rng.integers(len(self.style.kinds)))]

    def phrasing(self) -> Phrasing:
        return self.style.phrasings[int(self.rng.integers(len(self.style.phrasings)))]

    def value(self, kind: Kind) -> str:
        if kind == "word":
            return VALUE_WORDS[int(self.rng.integers(len(VALUE_WORDS)))]
        low, high = self.style.digits
        digits = int(self.rng.integers(low, high + 1))
        return str(int(self.rng.integers(10 ** (digits - 1), 10**digits)))

    def values(self, kind: Kind, count: int) -> list[str]:
        """`count` different values of one kind."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.value(kind)] = None
        return list(found)

    def shuffled(self, count: int) -> list[int]:
        return [int(i) for i in self.rng.permutation(count)]


def recalled(value: str) -> Part:
    """A value inside an answer, with the space that stands before it."""
    return Part(f" {value}", recalled=True)


def ask(
    question: str,
    restated: str,
    parts: list[Part],
    *,
    targets: list[str],
    facts: list[int],
    kind: Kind,
    phrasing: Phrasing,
    self_restating: bool = False,
) -> Question:
    """Build a question in either phrasing.

    `restated` is the opening of the answer that names the key (" amber-falcon is"). It belongs to
    the prompt in the restated phrasing. In the natural phrasing it is left out, or, for answers
    that are lists or traces (`self_restating`), written by the model itself.
    """
    prompt = f"Q: {question} A:"
    if phrasing == "restated":
        prompt += restated
    elif self_restating:
        parts = [Part(restated, recalled=False), *parts]
    return Question(prompt, tuple(parts), tuple(targets), tuple(facts), kind, phrasing)
