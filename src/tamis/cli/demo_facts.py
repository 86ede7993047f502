"""The part of `tamis demo` that asks for facts hidden in a long text, under every plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tamis.bench.exercise import Exercise
from tamis.bench.record import Settings
from tamis.bench.results import Answer, ResultFile, Timing
from tamis.bench.runner import Prompting, check_work, open_work, run_answers
from tamis.bench.speed import SpeedWork, run_timings
from tamis.bench.suites import generated
from tamis.bench.summary import Summary
from tamis.bench.tasks.puzzle import KINDS, PHRASINGS
from tamis.bench.tasks.samples import Suite
from tamis.bench.text import NOTHING, ratio, seconds
from tamis.cli.bench_screen import progress
from tamis.llm import LLM
from tamis.plan import Plan
from tamis.platform import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

PLANS = (
    "dense",
    "quest(pages=8)",
    "kivi(bits=4)",
    "snapkv(budget=0.25) + kivi(bits=4)",
    "streamingllm(budget=0.25)",
)
"""The plans that the demo compares, exact attention first."""

CONVERSATION = "multi_turn"
"""The task of which one document's questions and answers are printed."""

TASKS = ("single", "multi_key", "key_value", CONVERSATION)
SAMPLES = 2
SEED = 0
_NEW_TOKENS = 32


def hide(llm: LLM, document: Path | None, length: int, scratch: Path) -> list[Exercise]:
    """Questions on documents of `length` tokens, with facts hidden in the text of `document`.

    Args:
        document: a text file; None is Python's own library.
        scratch: a folder for the documents.

    Raises:
        ConfigError: the facts do not fit into `length`, or that into the model's context.
    """
    suites = [Suite(task, length, SAMPLES, SEED, haystack=document) for task in TASKS]
    return generated(llm, suites, scratch / "samples")


def ask(
    llm: LLM,
    exercises: list[Exercise],
    plans: dict[str, Plan],
    text: str,
    scratch: Path,
) -> Summary:
    """Answer all questions under every plan as one batch, then time each plan on its own.

    Args:
        plans: by their names.
        text: what the prompts that are timed are cut from.
        scratch: a folder for the results.
    """
    length = exercises[0].length
    assert length is not None  # our own tasks have one; only published prompts have not
    with (
        ResultFile(scratch / "answers.jsonl", Answer) as answers,
        ResultFile(scratch / "timings.jsonl", Timing) as timings,
    ):
        work = open_work(exercises, plans, ())
        timed = SpeedWork(plans, (length,), 1, _NEW_TOKENS, text, frozenset())
        check_work(llm, work, Prompting())
        timed.check(llm)
        with progress("answers", work.characters) as advance:
            run_answers(llm, work, Prompting(), answers, advance)
        with progress("times", timed.tokens) as advance:
            run_timings(llm, timed, timings, advance)
    return Summary(answers.rows, timings.rows, first=list(plans))


def show(out: Console, exercises: list[Exercise], summary: Summary) -> None:
    """Print one document's questions with their answers, then what every plan did and cost."""
    from rich.table import Table
    from rich.text import Text

    plan, length = summary.plans[0], exercises[0].length
    asked = {(e.task, e.sample, e.question): e for e in exercises}
    talk = Table(title=f"one document, plan {plan}", title_justify="left")
    talk.add_column("lies at", justify="right")
    for column in ("asked", "answered", ""):
        talk.add_column(column, overflow="fold")
    for answer in sorted(summary.answers, key=lambda answer: answer.question):
        if (answer.plan, answer.task, answer.sample) == (plan, CONVERSATION, 0):
            exercise = asked[answer.task, answer.sample, answer.question]
            question = exercise.text.rstrip("\n").rpartition("\n")[2]
            said = answer.error or answer.answer.strip()
            verdict = "right" if answer.exact else f"wrong: it is {answer.expected[0].strip()}"
            place = f"{100 * (exercise.depth or 0):.0f} %"
            talk.add_row(place, Text(question), Text(said), Text(verdict))
    out.print(talk)

    table = Table(title=f"all {len(exercises)} questions", title_justify="left")
    for column in ("plan", "right", "KV kept", "of dense", "first token", "each token"):
        wide = {"overflow": "fold"} if column == "plan" else {"no_wrap": True}
        table.add_column(column, justify="left" if column == "plan" else "right", **wide)
    for name in summary.plans:
        answers = [a for a in summary.answers if a.plan == name]
        right = sum(a.exact is True for a in answers)
        memory, speed = summary.memory(name, length), summary.speed(name, length)
        costs = [NOTHING] * 4
        if memory is not None and speed is not None:
            costs = [
                format_bytes(round(memory.end)),
                ratio(memory.kept),
                seconds(speed.ttft_s.median),
                seconds(speed.tpot_s.median),
            ]
        table.add_row(name, f"{right} of {len(answers)}", *costs)
    out.print(table)


def settings(llm: LLM, document: Path | None) -> Settings:
    """What the results depend on, for the report."""
    return Settings(
        model=llm.model.name,
        parameters=llm.model.n_parameters,
        dtype=str(llm.model.dtype).removeprefix("torch."),
        device=str(llm.model.device),
        haystack="" if document is None else str(document),
        samples=SAMPLES,
        seed=SEED,
        kinds=KINDS,
        phrasings=PHRASINGS,
        chat=False,
        truncate=False,
        new_tokens=_NEW_TOKENS,
    )
