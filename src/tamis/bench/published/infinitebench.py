"""InfiniteBench's files: `context`, `input`, `answer` and `options` per line.

A file's task is its name. Metrics are InfiniteBench's; the instructions around context and input
are in our own words, so scores are comparable between plans, and only roughly with published ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tamis.bench.exercise import Exercise
from tamis.bench.published import metrics
from tamis.bench.published.lines import Line, read_lines
from tamis.bench.published.metrics import Metric
from tamis.errors import ConfigError

_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class _Task:
    """The prompt, the most tokens of an answer, and the metric.

    Without a metric the answer is the letter of an option, or, where there are no options, a list.
    """

    prompt: str
    max_tokens: int
    metric: Metric | None = None
    options: bool = False


_QUESTION = (
    "{context}\n\nAnswer the question as concisely as you can.\n\nQuestion: {input}\nAnswer:"
)
_CHOICE = (
    "{context}\n\n{input}\n\n{options}\n\nAnswer with the letter of the right option.\nAnswer:"
)

TASKS: dict[str, _Task] = {
    "passkey": _Task("{context}\n\n{input}\n\nThe pass key is", 6, metrics.first_number),
    "number_string": _Task(
        "{context}\n\n{input}\n\nThe sequence of digits is", 12, metrics.first_number
    ),
    "kv_retrieval": _Task("{context}\n\n{input}", 50, metrics.word_of_answer),
    "longbook_sum_eng": _Task(
        "{context}\n\nSummarize the book above.\n\nSummary:", 1200, metrics.rouge_l_sum
    ),
    "longbook_choice_eng": _Task(_CHOICE, 40, options=True),
    "longbook_qa_eng": _Task(_QUESTION, 40, metrics.qa_f1),
    "longbook_qa_chn": _Task(
        "{context}\n\n请尽量简短地回答问题。\n\n问题：{input}\n回答：",  # noqa: RUF001
        40,
        metrics.qa_f1_chinese,
    ),
    "longdialogue_qa_eng": _Task(
        "{context}\n\nOne name of a speaker was replaced by $$MASK$$. Which one? Answer with the "
        "name only.\n\nThe name is",
        40,
        lambda answer, reference: metrics.word_of_answer(answer.upper(), reference.upper()),
    ),
    "math_find": _Task("{context}\n\n{input}", 3, metrics.first_number),
    "math_calc": _Task(
        "{input}\n\n{context}\n\nGive every intermediate result, in order, separated by commas.\n"
        "Results:",
        8192,
    ),
    "code_run": _Task("{context}\n\n{input}", 5, metrics.last_word),
    "code_debug": _Task(_CHOICE, 5, options=True),
}
"""Every task by the name of its file."""


def load_infinitebench(path: Path) -> list[Exercise]:
    """The exercises of one InfiniteBench file.

    Raises:
        ConfigError: it cannot be read, is named after no task, or a line lacks a field; names the
            file and the line.
    """
    task = TASKS.get(path.stem)
    if task is None:
        raise ConfigError(
            f"the name of {path} says no InfiniteBench task; files are called "
            f"{', '.join(f'{name}.jsonl' for name in TASKS)}"
        )
    lines = read_lines(path, "InfiniteBench")
    return [_exercise(task, line, index) for index, line in enumerate(lines)]


def _exercise(task: _Task, line: Line, index: int) -> Exercise:
    references = line.texts("answer")
    options = line.texts("options") if task.options else ()
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))
    parts = {"context": line.text("context"), "input": line.text("input"), "options": listed}
    return Exercise(
        task=f"infinitebench/{line.path.stem}",
        length=None,
        sample=index,
        question=0,
        text=task.prompt.format_map(parts),
        expected=references,
        score=_judge(task, line, references, options),
        max_tokens=task.max_tokens,
        source=line.where,
    )


def _judge(
    task: _Task, line: Line, references: tuple[str, ...], options: tuple[str, ...]
) -> Callable[[str], float]:
    if task.options:
        right = references[0]
        if right not in options[: len(_LETTERS)]:
            raise line.error(f"the answer {right!r} is none of the first {len(_LETTERS)} options")
        letter = _LETTERS[options.index(right)]
        return lambda answer: metrics.choice(answer, letter, right, _LETTERS[: len(options)])
    metric = task.metric
    if metric is None:
        return lambda answer: metrics.common_start(answer, references)
    return lambda answer: max(metric(answer, reference) for reference in references)
