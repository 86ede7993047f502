"""Needles: "The magic number for amber-falcon is 48392.", after RULER's NIAH family."""

from __future__ import annotations

from tamis.bench.tasks.puzzle import Draw, Kind, Part, Puzzle, Question, ask, recalled


def _fact(key: str, kind: Kind, value: str) -> str:
    return f"The magic {kind} for {key} is {value}.\n"


def needles(draw: Draw, count: int) -> Puzzle:
    """`count` keys with one value each; question i asks for fact i."""
    keys = draw.keys(count)
    facts: list[str] = []
    questions: list[Question] = []
    for i, key in enumerate(keys):
        kind = draw.kind()
        value = draw.value(kind)
        facts.append(_fact(key, kind, value))
        questions.append(
            ask(
                f"What is the magic {kind} for {key}?",
                f" {key} is",
                [recalled(value)],
                targets=[value],
                facts=[i],
                kind=kind,
                phrasing=draw.phrasing(),
            )
        )
    return Puzzle("needle", tuple(facts), tuple(questions))


def multi_query(draw: Draw, count: int, asked: int) -> Puzzle:
    """`count` keys of one kind of value; every question asks for `asked` of them at once."""
    kind = draw.kind()
    keys = draw.keys(count)
    values = [draw.value(kind) for _ in keys]
    order = draw.shuffled(count)
    questions: list[Question] = []
    for start in range(0, count - asked + 1, asked):
        group = order[start : start + asked]
        parts = [recalled(values[group[0]])]
        for i in group[1:]:
            parts += [Part(f", {keys[i]} is", recalled=False), recalled(values[i])]
        names = ", ".join(keys[i] for i in group)
        questions.append(
            ask(
                f"What are the magic {kind}s for {names}?",
                f" {keys[group[0]]} is",
                parts,
                targets=[values[i] for i in group],
                facts=sorted(group),
                kind=kind,
                phrasing=draw.phrasing(),
                self_restating=True,
            )
        )
    facts = [_fact(key, kind, value) for key, value in zip(keys, values, strict=True)]
    return Puzzle("multi_query", tuple(facts), tuple(questions))


def multi_value(draw: Draw, count: int, values: int, *, numbered: bool) -> Puzzle:
    """`count` keys with `values` values each; a question asks for all values of one key.

    The answer lists them in the order of the document, each after its key and rank. With
    `numbered`, the facts carry the rank too ("for amber-falcon #2 is"); without it the rank must
    be worked out from the order of otherwise equal sentences, which is much harder.
    """
    kind = draw.kind()
    keys = draw.keys(count)
    owners = [key for key in range(count) for _ in range(values)]
    owners = [owners[i] for i in draw.shuffled(len(owners))]
    where: list[list[int]] = [[] for _ in keys]
    held = [draw.values(kind, values) for _ in keys]
    facts: list[str] = []
    for line, owner in enumerate(owners):
        where[owner].append(line)
        rank = len(where[owner])
        name = f"{keys[owner]} #{rank}" if numbered else keys[owner]
        facts.append(_fact(name, kind, held[owner][rank - 1]))
    questions: list[Question] = []
    for key, lines, found in zip(keys, where, held, strict=True):
        parts = [recalled(found[0])]
        for rank, value in enumerate(found[1:], start=2):
            parts += [Part(f", {key} #{rank} is", recalled=False), recalled(value)]
        questions.append(
            ask(
                f"What are the {values} magic {kind}s for {key}?",
                f" {key} #1 is",
                parts,
                targets=found,
                facts=lines,
                kind=kind,
                phrasing=draw.phrasing(),
                self_restating=True,
            )
        )
    task = "multi_value" if numbered else "multi_value_unnumbered"
    return Puzzle(task, tuple(facts), tuple(questions))
