"""Hiding facts in real text, to an exact number of tokens of any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tamis.errors import ConfigError

Count = Callable[[str], int]
"""Tokens of a text, as the model will see it (special tokens included)."""

_PAD = " ."
_NEAR = 24  # characters tried on both sides of the best guess for an exact length


class Haystack:
    """Lines of real text, and how many tokens each has."""

    def __init__(self, lines: Sequence[str], count: Count) -> None:
        self.lines = tuple(lines)
        self._count = count
        self._sizes: dict[int, int] = {}

    def run_of(self, start: int, tokens: int) -> list[str]:
        """Lines from `start` on (the text goes round), of about `tokens` tokens together."""
        empty = self._count("")
        found: list[str] = []
        total = 0
        index = start
        while total <= tokens:
            place = index % len(self.lines)
            if place not in self._sizes:
                self._sizes[place] = max(1, self._count(self.lines[place]) - empty)
            total += self._sizes[place]
            found.append(self.lines[place])
            index += 1
        return found


def weave(lines: Sequence[str], facts: Sequence[str], depths: Sequence[float]) -> str:
    """Put fact i at the line boundary nearest to the share `depths[i]` of the lines' characters.

    `depths` rise from 0 to 1; facts at the same boundary keep their order.
    """
    ends = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    wanted = np.asarray(depths, dtype=float) * ends[-1]
    right = np.clip(np.searchsorted(ends, wanted), 0, len(ends) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(wanted - ends[left] <= ends[right] - wanted, left, right)
    pieces: list[str] = []
    done = 0
    for fact, boundary in zip(facts, nearest.tolist(), strict=True):
        pieces += lines[done:boundary]
        done = max(done, boundary)
        pieces.append(fact)
    pieces += lines[done:]
    return "".join(pieces)


def hide(
    facts: Sequence[str],
    depths: Sequence[float],
    haystack: Haystack,
    start: int,
    length: int,
    count: Count,
) -> str:
    """A document of exactly `length` tokens: `facts` at `depths` in haystack lines from `start` on.

    The last line of the haystack is cut where the length comes out right, and padded with full
    stops where no cut does. Raises ConfigError if the facts alone are longer than `length`.
    """
    bare = count("".join(facts))
    if bare > length:
        raise ConfigError(
            f"the task's facts alone take {bare} tokens; a length of {length} is too short for them"
        )
    lines = haystack.run_of(start, length - bare)

    def document(whole: int, partial: str) -> str:
        ended = [partial + "\n"] if partial else []
        return weave([*lines[:whole], *ended], facts, depths)

    whole = len(lines)
    while whole and (size := count(document(whole, ""))) > length - 2:
        whole -= max(1, int((size - length) / size * whole * 0.9))
        whole = max(0, whole)
    if count(document(whole, "")) == length:
        return document(whole, "")
    tail = " ".join(line.strip() for line in lines[whole:]).strip()
    tail = tail or "".join(line.strip() + " " for line in haystack.lines[:50]).strip()
    low, high = 0, len(tail)
    while low < high:
        middle = (low + high + 1) // 2
        if count(document(whole, tail[:middle])) <= length:
            low = middle
        else:
            high = middle - 1
    for cut in range(low, max(0, low - _NEAR), -1):
        if count(document(whole, tail[:cut])) == length:
            return document(whole, tail[:cut])
    for cut in range(low, max(0, low - _NEAR) - 1, -1):
        for pads in range(1, _NEAR):
            padded = tail[:cut] + _PAD * pads
            size = count(document(whole, padded))
            if size == length:
                return document(whole, padded)
            if size > length:
                break
    raise ConfigError(f"no text of exactly {length} tokens was found with this tokenizer")
