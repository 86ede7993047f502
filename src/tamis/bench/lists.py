"""The lists that the command line takes: plans, tasks, lengths."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from tamis.errors import ConfigError
from tamis.plan import Plan

T = TypeVar("T", bound=str)

_LENGTH = re.compile(r"(\d+)\s*([kK]?)")


def parse_plans(texts: Iterable[str]) -> dict[str, Plan]:
    """Plans by their own names, in order and without repetitions; `;` separates plans in a text.

    Raises:
        PlanError: a plan is wrong. ConfigError: there is none.
    """
    written = [part for text in texts for part in text.split(";") if part.strip()]
    plans = [Plan.parse(part.strip()) for part in written]
    if not plans:
        raise ConfigError("there is no plan; give --plans 'dense; ...'")
    return {str(plan): plan for plan in plans}


def parse_lengths(text: str) -> list[int]:
    """Lengths in tokens, rising, from text such as "1k, 4k, 6000"; k is 1024.

    Raises:
        ConfigError: the text is no such list.
    """
    lengths: set[int] = set()
    for part in parse_names(text):
        match = _LENGTH.fullmatch(part)
        length = 0 if match is None else int(match[1]) * (1024 if match[2] else 1)
        if length < 1:
            raise ConfigError(
                f"{part!r} is no length in tokens; give whole numbers, such as --lengths 1k,4k,6000"
            )
        lengths.add(length)
    return sorted(lengths)


def parse_choices(text: str, choices: tuple[T, ...], option: str) -> tuple[T, ...]:
    """Some of `choices`, by name, in their own order.

    Raises:
        ConfigError: a name is none of them, or there is none.
    """
    names = parse_names(text)
    unknown = [name for name in names if name not in choices]
    if unknown or not names:
        said = repr(unknown[0]) if unknown else "nothing"
        raise ConfigError(f"{option} has {said}; it takes one or more of {', '.join(choices)}")
    return tuple(choice for choice in choices if choice in names)


def parse_names(text: str) -> list[str]:
    """Names between commas, without repetitions."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
