"""RULER's generated files: `input`, `outputs` and, in newer ones, `answer_prefix` per line.

A file's task is its name, or the name of its folder where it is called validation.jsonl or
test.jsonl. Question answering is right if one reference stands in the answer (`string_match_part`);
in all other tasks the score is the share of the references (`string_match_all`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tamis.bench.exercise import Exercise
from tamis.bench.published.lines import read_lines
from tamis.bench.published.metrics import contains

_SPLITS = frozenset({"validation", "test"})
_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def string_match_all(answer: str, references: tuple[str, ...]) -> float:
    """The share of the references that stand in the answer."""
    return sum(contains(answer, reference) for reference in references) / len(references)


def string_match_part(answer: str, references: tuple[str, ...]) -> float:
    """1 if one of the references stands in the answer."""
    return max(contains(answer, reference) for reference in references)


def load_ruler(path: Path) -> list[Exercise]:
    """The exercises of one RULER file.

    Raises:
        ConfigError: it cannot be read, or a line lacks a field; names the file and the line.
    """
    name = path.parent.name if path.stem in _SPLITS else path.stem
    family = name.split("_")[0]
    metric = string_match_part if family == "qa" else string_match_all
    exercises: list[Exercise] = []
    for index, line in enumerate(read_lines(path, "RULER")):
        prefix = line.text("answer_prefix") if "answer_prefix" in line.values else ""
        references = line.texts("outputs")
        exercises.append(
            Exercise(
                task=f"ruler/{name}",
                length=None,
                sample=index,
                question=0,
                text=line.text("input") + prefix,
                expected=references,
                score=_Against(metric, references),
                max_tokens=_NEW_TOKENS.get(family, 128),
                source=line.where,
            )
        )
    return exercises


@dataclass(frozen=True)
class _Against:
    metric: Callable[[str, tuple[str, ...]], float]
    references: tuple[str, ...]

    def __call__(self, answer: str) -> float:
        return self.metric(answer, self.references)
