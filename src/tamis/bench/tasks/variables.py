"""Variable tracking: "VAR AB = 48392", "VAR CD = AB"; the answer traces CD back to its value."""

from __future__ import annotations

import numpy as np

from tamis.bench.tasks.puzzle import Draw, Part, Puzzle, Question, ask, recalled


def variable_traces(draw: Draw, chains: int, hops: int) -> Puzzle:
    """`chains` chains of `hops` assignments each; one question per chain, about its last variable.

    A chain's lines keep their order; the chains are interleaved at random.
    """
    names = [draw.variables(hops + 1) for _ in range(chains)]
    owners = np.repeat(np.arange(chains), hops + 1)
    owners = owners[draw.shuffled(len(owners))]
    where: list[list[int]] = [[] for _ in range(chains)]
    kinds = [draw.kind() for _ in range(chains)]
    values = [draw.value(kind) for kind in kinds]
    facts: list[str] = []
    for line, chain in enumerate(owners.tolist()):
        link = len(where[chain])
        right = values[chain] if link == 0 else names[chain][link - 1]
        facts.append(f"VAR {names[chain][link]} = {right}\n")
        where[chain].append(line)
    questions: list[Question] = []
    for chain in range(chains):
        asked = names[chain][-1]
        parts: list[Part] = []
        for name in reversed(names[chain][:-1]):
            parts += [recalled(name), Part(" =", recalled=False)]
        questions.append(
            ask(
                f"What is the value of {asked}?",
                f" {asked} =",
                [*parts, recalled(values[chain])],
                targets=[values[chain]],
                facts=where[chain],
                kind=kinds[chain],
                phrasing=draw.phrasing(),
                self_restating=True,
            )
        )
    return Puzzle("variables", tuple(facts), tuple(questions))
