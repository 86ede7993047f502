"""One prompt with a known answer: what a task, of our own or published, comes down to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tamis.bench.tasks.samples import Sample

Score = Callable[[str], float]
"""How right an answer is, from 0 to 1."""

_SLACK = 16  # tokens beyond the right answer's, for models that put words around it


@dataclass(frozen=True)
class Exercise:
    """A prompt, and how what the model says to it is judged.

    Attributes:
        task: its name in results. `length`: tokens of its document, None as published.
        sample, question: which document of the task, and which question on it.
        text: the whole prompt.
        expected: the right answers, any of which would do.
        score: of an answer.
        max_tokens, stop: where the answer ends at the latest. None: some tokens beyond the
            longest right answer.
        depth: where in the document the needed facts lie, from 0 (start) to 1 (end).
        kind, phrasing: as in `tamis.bench.tasks.puzzle`.
        completion: the text is to be continued as it stands, whatever the model's chat template.
        source: the file and line it came from, if any.
    """

    task: str
    length: int | None
    sample: int
    question: int
    text: str
    expected: tuple[str, ...]
    score: Score
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    depth: float | None = None
    kind: str | None = None
    phrasing: str | None = None
    completion: bool = False
    source: str = ""

    @cached_property
    def digest(self) -> str:
        """A short hash of the prompt's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def answer_tokens(self, count: Callable[[str], int]) -> int:
        """The most tokens of an answer, with `count` giving the tokens of a text."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(count(answer) for answer in self.expected) + _SLACK

    def is_exact(self, answer: str) -> bool:
        """Whether the answer is a right one and nothing else (spaces apart)."""
        said = answer.split()
        return any(said == expected.split() for expected in self.expected)


def exercises_of(samples: Iterable[Sample]) -> Iterator[Exercise]:
    """One exercise per question, asked of its document alone; those of a document adjoin."""
    for sample in samples:
        for i, question in enumerate(sample.questions):
            yield Exercise(
                task=sample.task,
                length=sample.length,
                sample=sample.index,
                question=i,
                text=sample.prompt(i),
                expected=(question.answer,),
                score=_TargetsFound(question.targets),
                stop=("\n",),
                depth=sample.depths[i],
                kind=question.kind,
                phrasing=question.phrasing,
            )


def targets_found(answer: str, targets: Sequence[str]) -> float:
    """The share of `targets` that stand in `answer` as whole words, in their order."""
    found, at = 0, 0
    for target in targets:
        match = re.compile(rf"(?<!\w){re.escape(target)}(?!\w)").search(answer, at)
        if match is not None:
            found, at = found + 1, match.end()
    return found / len(targets)


@dataclass(frozen=True)
class _TargetsFound:
    targets: tuple[str, ...]

    def __call__(self, answer: str) -> float:
        return targets_found(answer, self.targets)
