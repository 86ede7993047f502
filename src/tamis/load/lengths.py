"""How long prompts and answers are: distributions of numbers of tokens."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random

from tamis.errors import ConfigError

_CALL = re.compile(r"(\w+)\(([^()]*)\)")


class Lengths(ABC):
    """Numbers of tokens, at least 1 each."""

    @abstractmethod
    def draw(self, random: Random) -> int:
        """One of them."""


@dataclass(frozen=True)
class Fixed(Lengths):
    """All the same."""

    tokens: int

    def __post_init__(self) -> None:
        _check(self.tokens >= 1, f"a length is {self.tokens}; it must be at least 1")

    def draw(self, random: Random) -> int:
        return self.tokens


@dataclass(frozen=True)
class Uniform(Lengths):
    """From `low` to `high`, both included, all as likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        fits = 1 <= self.low <= self.high
        _check(fits, f"uniform({self.low}, {self.high}) needs 1 <= low <= high")

    def draw(self, random: Random) -> int:
        return random.randint(self.low, self.high)


@dataclass(frozen=True)
class LogNormal(Lengths):
    """Many around the `median` and a few that are very long: `median` times e to the power of a
    normal variable with the standard deviation `sigma`."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        fits = self.median >= 1 and self.sigma >= 0
        _check(fits, f"lognormal({self.median}, {self.sigma}) needs median >= 1 and sigma >= 0")

    def draw(self, random: Random) -> int:
        return max(1, round(random.lognormvariate(math.log(self.median), self.sigma)))


def parse(text: str) -> Lengths:
    """Lengths as they are written: `512`, `uniform(64, 512)` or `lognormal(512, 0.5)`.

    Raises:
        ConfigError: it is none of them.
    """
    try:
        if (call := _CALL.fullmatch(text.strip())) is None:
            return Fixed(int(text))
        first, second = call[2].split(",")
        if call[1] == "uniform":
            return Uniform(int(first), int(second))
        if call[1] == "lognormal":
            return LogNormal(float(first), float(second))
    except ConfigError:
        raise
    except ValueError:
        pass
    raise ConfigError(
        f"{text!r} is no distribution of lengths; write 512, uniform(64, 512) or "
        "lognormal(512, 0.5), which are median and sigma"
    )


def _check(fits: bool, message: str) -> None:
    if not fits:
        raise ConfigError(message)
