"""Most frequent word: named lists of words, spread over the document line by line."""

from __future__ import annotations

import numpy as np

from tamis.bench.tasks.puzzle import Draw, Puzzle, Question, ask, recalled
from tamis.bench.tasks.words import VALUE_WORDS

WORDS_PER_LINE = 6


def frequent_words(draw: Draw, lists: int, lines: int, *, distinct: int, ratio: float) -> Puzzle:
    """`lists` lists of `lines` lines; in each, one of `distinct` words is the most frequent.

    That word occurs about `ratio` times as often as each of the others, and always at least once
    more. The lines of different lists are interleaved.
    """
    keys = draw.keys(lists)
    owners = np.repeat(np.arange(lists), lines)
    owners = owners[draw.shuffled(len(owners))]
    bags: list[list[str]] = []
    tops: list[str] = []
    for _ in keys:
        chosen = draw.rng.permutation(len(VALUE_WORDS))[:distinct]
        counts = _counts(lines * WORDS_PER_LINE, distinct, ratio)
        bag = np.repeat(chosen, counts)
        bags.append([VALUE_WORDS[i] for i in bag[draw.shuffled(len(bag))]])
        tops.append(VALUE_WORDS[chosen[0]])
    where: list[list[int]] = [[] for _ in keys]
    facts: list[str] = []
    for line, owner in enumerate(owners.tolist()):
        start = len(where[owner]) * WORDS_PER_LINE
        words = " ".join(bags[owner][start : start + WORDS_PER_LINE])
        facts.append(f"list {keys[owner]}: {words}\n")
        where[owner].append(line)
    questions: list[Question] = [
        ask(
            f"Which word is most frequent in list {key}?",
            f" {key} has mostly",
            [recalled(top)],
            targets=[top],
            facts=lines_of_key,
            kind="word",
            phrasing=draw.phrasing(),
        )
        for key, top, lines_of_key in zip(keys, tops, where, strict=True)
    ]
    return Puzzle("frequent", tuple(facts), tuple(questions))


def _counts(total: int, distinct: int, ratio: float) -> list[int]:
    """Occurrences of each word: the first about `ratio` times the others, which differ by <= 1."""
    if distinct < 2 or total < distinct + 1:
        raise ValueError(f"{total} words cannot hold {distinct} different ones with one on top")
    top = max(round(total * ratio / (ratio + distinct - 1)), -(-total // distinct))
    rest = total - top
    counts = [top] + [
        rest // (distinct - 1) + (i < rest % (distinct - 1)) for i in range(distinct - 1)
    ]
    while counts[0] <= max(counts[1:]):
        counts[0] += 1
        counts[counts.index(max(counts[1:]), 1)] -= 1
    return counts
