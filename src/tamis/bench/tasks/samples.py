"""Samples of a task: documents of an exact length with questions about them, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tamis.bench.tasks.compose import Count, Haystack, hide
from tamis.bench.tasks.corpus import haystack_lines
from tamis.bench.tasks.puzzle import (
    KINDS,
    PHRASINGS,
    Draw,
    Kind,
    Part,
    Phrasing,
    Question,
    Style,
)
from tamis.bench.tasks.scenes import TASKS
from tamis.errors import ConfigError

_VERSION = 1  # of wording and placement; samples cached under another one are made anew


class Tokenizer(Protocol):
    """What the tasks need of a tokenizer; every 🤗 tokenizer has it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens included."""
        ...


@dataclass(frozen=True)
class Suite:
    """Which samples to make; with a tokenizer, it decides every character of them.

    length: tokens of each document. count: documents. kinds, phrasings, digits: the values and
    questions that may occur (see `puzzle`). haystack: a text file to hide the facts in; None is
    the held-out part of the standard library.
    """

    task: str
    length: int
    count: int
    seed: int = 0
    kinds: tuple[Kind, ...] = KINDS
    phrasings: tuple[Phrasing, ...] = PHRASINGS
    digits: tuple[int, int] = (5, 5)
    haystack: Path | None = None


@dataclass(frozen=True)
class Sample:
    """One document and the questions on it.

    Each question is asked of the document alone or, in the order given, as the next turn of one
    conversation. `document` has exactly `length` tokens and ends with a newline; `depths[i]` is
    where the facts for question i lie on average, from 0 (start) to 1 (end).
    """

    task: str
    index: int
    length: int
    document: str
    questions: tuple[Question, ...]
    depths: tuple[float, ...]

    def prompt(self, question: int, *, history: bool = False) -> str:
        """Document and question; with `history`, the earlier questions and their right answers."""
        turns = self.questions[:question] if history else ()
        earlier = "".join(f"{turn.prompt}{turn.answer}\n" for turn in turns)
        return self.document + earlier + self.questions[question].prompt


def make_samples(
    suite: Suite,
    tokenizer: Tokenizer,
    *,
    context: int | None = None,
    cache: Path | None = None,
) -> list[Sample]:
    """The samples of a suite; sample i of n has its depth, where one is set, at (i + 0.5) / n.

    `context` is the most tokens that the model takes: a task that is longer is refused. `cache` is
    a folder in which samples are kept from one call to the next.

    Raises ConfigError for an unknown task, a length that is too short for the task's facts or too
    long for `context`, or an unreadable haystack.
    """
    if suite.task not in TASKS:
        raise ConfigError(f"there is no task {suite.task!r}; there are {', '.join(TASKS)}")
    if suite.count < 1:
        raise ConfigError(f"a suite has at least one sample, not {suite.count}")
    lines = haystack_lines(suite.haystack)
    path = None if cache is None else cache / f"{suite.task}-{_key(suite, tokenizer, lines)}.jsonl"
    if path is not None and path.exists():
        found = _load(path)
    else:
        found = _make(suite, tokenizer, lines)
        if path is not None:
            _save(path, found)
    if context is not None:
        _check_context(found, tokenizer, context)
    return found


def _make(suite: Suite, tokenizer: Tokenizer, lines: tuple[str, ...]) -> list[Sample]:
    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    haystack = Haystack(lines, count)
    return [_one(suite, index, haystack, count) for index in range(suite.count)]


def _one(suite: Suite, index: int, haystack: Haystack, count: Count) -> Sample:
    def fitting(probe: Sequence[str]) -> int:
        return int(0.97 * suite.length * len(probe) / (count("".join(probe)) - count("")))

    task = int.from_bytes(hashlib.sha256(suite.task.encode()).digest()[:4], "big")
    rng = np.random.default_rng([suite.seed, task, suite.length, index])
    draw = Draw(rng, Style(suite.kinds, suite.phrasings, suite.digits))
    scene = TASKS[suite.task](draw, (index + 0.5) / suite.count, fitting)
    start = int(rng.integers(len(haystack.lines)))
    facts = scene.puzzle.facts
    document = hide(facts, scene.depths, haystack, start, suite.length, count)
    return Sample(suite.task, index, suite.length, document, scene.questions, scene.question_depths)


def _check_context(samples: list[Sample], tokenizer: Tokenizer, context: int) -> None:
    for sample in samples:
        for i, question in enumerate(sample.questions):
            needed = len(tokenizer.encode(sample.prompt(i, history=True) + question.answer))
            if needed > context:
                raise ConfigError(
                    f"task {sample.task!r} at length {sample.length} needs {needed} tokens with "
                    f"its questions and answers; the model's context is {context}"
                )


def _key(suite: Suite, tokenizer: Tokenizer, lines: tuple[str, ...]) -> str:
    """A name for what decides the samples: the suite, the haystack's text, the tokenizer."""
    digest = hashlib.sha256()
    settings = {**asdict(suite), "haystack": None, "version": _VERSION}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    text = "".join(lines)
    digest.update(text.encode())
    digest.update(json.dumps(tokenizer.encode(text[:20000])).encode())
    return digest.hexdigest()[:20]


def _save(path: Path, samples: list[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(sample)) + "\n" for sample in samples)
    os.replace(partial, path)


def _load(path: Path) -> list[Sample]:
    with path.open(encoding="utf-8") as file:
        return [_sample(json.loads(line)) for line in file]


def _sample(saved: dict[str, Any]) -> Sample:
    questions = tuple(
        Question(
            prompt=question["prompt"],
            parts=tuple(Part(**part) for part in question["parts"]),
            targets=tuple(question["targets"]),
            facts=tuple(question["facts"]),
            kind=question["kind"],
            phrasing=question["phrasing"],
        )
        for question in saved["questions"]
    )
    return Sample(
        saved["task"],
        saved["index"],
        saved["length"],
        saved["document"],
        questions,
        tuple(saved["depths"]),
    )
