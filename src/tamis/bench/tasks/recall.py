"""Key-value recall: a document of "key amber-falcon = 48392" lines."""

from __future__ import annotations

from tamis.bench.tasks.puzzle import Draw, Puzzle, Question, ask, recalled


def key_values(draw: Draw, count: int) -> Puzzle:
    """`count` pairs; question i asks for pair i."""
    facts: list[str] = []
    questions: list[Question] = []
    for i, key in enumerate(draw.keys(count)):
        kind = draw.kind()
        value = draw.value(kind)
        facts.append(f"key {key} = {value}\n")
        questions.append(
            ask(
                f"What is key {key}?",
                f" {key} =",
                [recalled(value)],
                targets=[value],
                facts=[i],
                kind=kind,
                phrasing=draw.phrasing(),
            )
        )
    return Puzzle("key_value", tuple(facts), tuple(questions))
