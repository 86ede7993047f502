"""The exercises of a run: generated tasks, and published files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tamis.bench.exercise import Exercise, exercises_of
from tamis.bench.published.infinitebench import load_infinitebench
from tamis.bench.published.longbench import load_longbench
from tamis.bench.published.ruler import load_ruler
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.errors import ConfigError
from tamis.llm import LLM

LOADERS: dict[str, Callable[[Path], list[Exercise]]] = {
    "ruler": load_ruler,
    "longbench": load_longbench,
    "infinitebench": load_infinitebench,
}
"""Readers of published files, by the name of their format."""


def generated(llm: LLM, suites: Iterable[Suite], cache: Path) -> list[Exercise]:
    """The exercises of our own tasks, their documents kept in the folder `cache`.

    Raises:
        ConfigError: a task is unknown, its length does not fit it or the model's context, or the
            haystack or the folder cannot be used. RequestError: the model has no tokenizer.
    """
    exercises: list[Exercise] = []
    for suite in suites:
        try:
            samples = make_samples(suite, llm, context=llm.model.max_length, cache=cache)
        except OSError as error:
            raise ConfigError(f"cannot keep samples in {cache}: {error.strerror}") from error
        exercises += exercises_of(samples)
    return exercises


def published(files: dict[str, Sequence[Path]], most: int) -> list[Exercise]:
    """The first `most` exercises of each published file, by format.

    Raises:
        ConfigError: a file cannot be read as what it should be, or two files are of one task.
    """
    exercises: list[Exercise] = []
    origins: dict[tuple[str, int], str] = {}
    for format, paths in files.items():
        for path in paths:
            for exercise in LOADERS[format](path)[:most]:
                place = (exercise.task, exercise.sample)
                if place in origins:
                    raise ConfigError(
                        f"{origins[place]} and {exercise.source} are both sample "
                        f"{exercise.sample} of {exercise.task}; give one file per task"
                    )
                origins[place] = exercise.source
                exercises.append(exercise)
    return exercises
