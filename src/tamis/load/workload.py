"""What is asked for, and when: drawn from a seed, the same whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tamis.errors import ConfigError
from tamis.load.lengths import Lengths

_WORDS = (
    "after again along also area back been began being best black book both boy call came car "
    "case city come cut day did does door down each earth end even eye face far feet few find "
    "fire first fish food form found four from full game gave girl give good great group hand "
    "hard head help here high hold home horse hour house idea into just keep kind king knew land "
    "large last late left life light line list live long look made main make many mark mind moon "
    "more most move much music must name near need never next night north note open order over "
    "page paper part place plan plant point port road rock room round rule sea second seem ship "
    "short side slow small snow some song soon sound stand star start state still stop story such "
    "sun sure table take talk tell test then thing think time took town tree true turn under unit "
    "upon very voice wait walk war warm watch water well went west wheel while white whole wind "
    "with wood word work world year young"
)
"""Short common English words: about a token each to most tokenizers."""


@dataclass(frozen=True)
class Scale:
    """How many tokens words are to the server: `fixed` and `per_word` for each."""

    fixed: float
    per_word: float

    @classmethod
    def between(cls, short: tuple[int, int], long: tuple[int, int]) -> Scale:
        """From two prompts' (words, tokens)."""
        per_word = max(0.1, (long[1] - short[1]) / (long[0] - short[0]))
        return cls(max(0.0, short[1] - per_word * short[0]), per_word)

    def words(self, n_tokens: int) -> int:
        """Words of a prompt of so many tokens, about."""
        return max(1, round((n_tokens - self.fixed) / self.per_word))


@dataclass(frozen=True)
class Planned:
    """A request that is due `at_s` seconds after the start."""

    at_s: float
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests whose arrivals are a Poisson process: the time between them is exponential, and
    nobody waits for an answer before asking.

    Args:
        rate: requests per second.
        prompt, output: tokens.
        shared: the share of every prompt that all of them begin with, 0 .. 1.
        seed: of all that is drawn.

    Raises:
        ConfigError: a number is out of range.
    """

    rate: float
    prompt: Lengths
    output: Lengths
    shared: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"rate is {self.rate}; it must be more than 0 requests per second")
        if not 0 <= self.shared <= 1:
            raise ConfigError(f"shared is {self.shared}; it must be a share from 0 to 1")

    def requests(self, scale: Scale) -> Iterator[Planned]:
        """The requests, without an end."""
        random = Random(self.seed)
        common: list[str] = []
        common_random = Random(f"{self.seed} shared")
        at_s = 0.0
        while True:
            at_s += random.expovariate(self.rate)
            n_words = scale.words(self.prompt.draw(random))
            n_shared = round(self.shared * n_words)
            common += text(common_random, n_shared - len(common))
            own = text(random, n_words - n_shared)
            yield Planned(at_s, " ".join(common[:n_shared] + own), self.output.draw(random))


def text(random: Random, n_words: int) -> list[str]:
    """So many words."""
    return random.choices(_WORDS.split(), k=max(0, n_words))
