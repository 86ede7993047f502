"""docs/methods.md: what every method is, and what it does to time, memory and answers.

    python benchmarks/methods_page.py    # results/methods.json -> docs/methods.md, docs/methods.svg

Names, parameters and papers come from the methods themselves, numbers from the results of
`benchmarks/methods.py`; without those the cells are empty. What a person has to say of the numbers
stands in results/methods_notes.md and is put below the goals.

The picture needs matplotlib (`pip install 'tamis[bench]'`).
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from methods_plans import BUDGETS, DENSE, SETTINGS, TOKENS, Setting
from report import number
from tamis.bench.text import NOTHING, length_text, mebibytes, percent, ratio, seconds
from tamis.cli.methods import describe
from tamis.methods.base import Method
from tamis.methods.registry import methods

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods.json"
NOTES = HERE / "results" / "methods_notes.md"
PAGE = HERE.parent / "docs" / "methods.md"
MEASURES = ("score, %", "KV held", "first token", "each token")
"""The columns that sum a method up."""
_EXACT = "to exact"
_TIMES = ("first token", _EXACT, "each token", _EXACT, "KV held, MiB", _EXACT, "peak to exact")

Row = Mapping[str, Any]


class Results:
    """The summary that `benchmarks/methods.py` writes, to be looked up; empty without one.

    Attributes:
        lengths, judged_lengths: tokens of the prompts that were timed and judged, ascending.
        tasks: that were judged.
    """

    def __init__(self, summary: Row | None) -> None:
        self.summary = summary or {"runs": {}, "timings": [], "quality": [], "goals": []}
        self._timings = {(row["plan"], row["length"]): row for row in self.summary["timings"]}
        self._quality = {(row["plan"], row["length"]): row for row in self.summary["quality"]}
        self.lengths = sorted({length for _, length in self._timings})
        self.judged_lengths = sorted({length for _, length in self._quality})
        self.tasks = list(
            dict.fromkeys(task for row in self.summary["quality"] for task in row["scores"])
        )

    def timing(self, plan: str, length: int | None = None) -> Row | None:
        """Of a plan at a length, by default the longest; None where it was not measured."""
        return self._timings.get((plan, length or max(self.lengths, default=0)))

    def quality(self, plan: str, length: int) -> Row | None:
        """Of a plan at a length; None where it was not judged."""
        return self._quality.get((plan, length))

    def score(self, plan: str) -> float | None:
        """The mean over all lengths; None where the plan was not judged at all of them."""
        rows = [self.quality(plan, length) for length in self.judged_lengths]
        scores = [row["score"] for row in rows if row is not None and row["score"] is not None]
        return fmean(scores) if scores and len(scores) == len(rows) else None

    @property
    def judged_text(self) -> str:
        """The lengths that were judged, such as "4k and 8k"."""
        return " and ".join(map(length_text, self.judged_lengths))


def own_methods() -> dict[str, type[Method]]:
    """The methods of tamis itself, by name in the order of the stages."""
    return {name: kind for name, kind in methods().items() if kind.__module__.startswith("tamis.")}


def page(kinds: Mapping[str, type[Method]], results: Results, notes: str = "") -> str:
    """The whole page, in Markdown.

    Args:
        kinds: the methods, by name.
        notes: what is said below the goals.
    """
    settings = {setting.method: setting for setting in SETTINGS}
    parts = [
        _opening(len(kinds), results),
        _overview(kinds, settings, results),
        *_goals(results),
        notes.strip(),
    ]
    for stage, names in groupby(kinds, lambda name: kinds[name].stage):
        parts += _stage(stage, [(kinds[name], settings.get(name)) for name in names], results)
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(count: int, results: Results) -> str:
    budgets = ", ".join(f"{100 * share:.0f}" for share in BUDGETS[:-1])
    lines = [
        "# Methods",
        "",
        "<!-- Written by benchmarks/methods_page.py; edit that, or a method's docstring. -->",
        "",
        f"The {count} methods that plans are made of, measured against exact attention. "
        "`tamis methods NAME` shows one whole, with the formulas, the ranges of its parameters, "
        "and every departure from its paper.",
        "",
        "- **score**: right answers of the reference model in percent, the mean over tasks that "
        f"ask for facts in a long text; with a budget of {budgets} and {100 * BUDGETS[-1]:.0f} % "
        "of the prompt where a method has one. The model is small and was trained for these "
        "tasks; it shows where a method loses what is asked for, not how a large model would do.",
        "- **KV held**: the pages on the device at the request's end; **first token** and **each "
        "token**: the time to it, and the median time of those after it. All three are of a "
        "Llama of random weights in bf16 with one request at a time, relative to exact attention "
        "in the same run, whose decode steps took turns with the method's. Random weights attend "
        "to everything alike and write nothing that could be foreseen, so that what adapts to the "
        "attention finds nothing to leave out, and what drafts is seldom right. "
        f"Methods that have a budget were timed with {TOKENS:,} tokens per head where their plan "
        "does not say otherwise; the table of each stage has all plans, of which the first stands "
        "for the method here.",
    ]
    runs = results.summary["runs"]
    if "timings" in runs:
        lines += ["", f"Times: {_where(runs['timings'])}. {_rounds(results)}"]
    if "answers" in runs:
        dtype = runs["answers"]["settings"]["dtype"]
        lines += ["", f"Scores, in {dtype}: {_where(runs['answers'])}. {_certainty(results)}"]
    if results.lengths and results.judged_lengths:
        lines += ["", "![time, memory and score of every method](methods.svg)"]
    return "\n".join(lines)


def _where(record: Row) -> str:
    """When a part was measured, and on what."""
    machine, versions = record["machine"], record["versions"]
    return (
        f"{record['date']}, {machine['processor']} ({machine['instruction sets']}), "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def _rounds(results: Results) -> str:
    """How often prompts of each length were timed."""
    rounds = {row["length"]: row["ttft_s"]["n"] for row in results.summary["timings"]}
    times = {1: "once", 2: "twice"}
    return (
        "Prompts of "
        + ", of ".join(
            f"{length_text(length)} tokens {times.get(n, f'{n} times')}"
            for length, n in sorted(rounds.items())
        )
        + ". A plan that decodes for more than half a minute is stopped there. The row of dense is "
        f"a second run of exact attention: how far it is from {ratio(1)} is the noise."
    )


def _certainty(results: Results) -> str:
    """How many answers a score is the mean of, and how far it can be off."""
    dense = [results.quality(DENSE, length) for length in results.judged_lengths]
    count = sum(row["answers"] for row in dense if row is not None)
    if not count:
        return ""
    error = 100 * 0.5 / math.sqrt(count)  # of a share of right answers, greatest at a half
    return (
        f"A score over {results.judged_text} is the mean of {count} answers, so that its standard "
        f"error is up to {error:.0f} points; all plans were asked the same."
    )


def _overview(
    kinds: Mapping[str, type[Method]], settings: Mapping[str, Setting], results: Results
) -> str:
    """A row per method, at the longest prompts."""
    rows = [[DENSE, "", "", "", *measures(DENSE, (DENSE,), results)]]
    for name, kind in kinds.items():
        setting = settings.get(name)
        facts = describe(kind)
        given = ", ".join(f"{one['name']}={one['default']!r}" for one in facts["parameters"])
        link = f"[{kind.__name__}](#{kind.stage})"
        parameters = f"`{given}`" if given else ""
        row = [link, kind.stage, _paper(kind.paper), parameters]
        plans = ("", ()) if setting is None else (setting.timed[0], setting.judged)
        rows.append([*row, *measures(*plans, results)])
    title = "## All of them"
    if results.lengths and results.judged_lengths:
        title += (
            f", with prompts of {length_text(max(results.lengths))} tokens for time and memory, "
            f"{results.judged_text} for scores"
        )
    return f"{title}\n\n" + _table(["method", "stage", "paper", "parameters", *MEASURES], rows)


def measures(timed: str, judged: Sequence[str], results: Results) -> list[str]:
    """What `MEASURES` says of a plan that was timed and those that were judged."""
    timing = results.timing(timed)
    return [
        " / ".join(percent(results.score(plan)) for plan in judged) or NOTHING,
        ratio(timing["kv_bytes"] / timing["kv_bytes_dense"]) if timing else NOTHING,
        ratio(timing["ttft_ratio"]["median"]) if timing else NOTHING,
        ratio(timing["tpot_ratio"]["median"]) if timing else NOTHING,
    ]


def _goals(results: Results) -> Iterator[str]:
    """What was to be reached, and whether it was."""
    goals = results.summary["goals"]
    if not goals:
        return
    rows = [
        [
            row["name"],
            f"{number(row['ours']['median'])} {row['unit']}",
            f"{number(row['theirs']['median'])} {row['unit']}",
            ratio(row["ratio"]),
            f"≤ {ratio(row['target']['bound'])}" if row["target"] else "",
            {True: "met", False: "**missed**", None: "not judged"}[row["met"]],
        ]
        for row in goals
    ]
    yield "## Goals\n\n" + _table(["", "method", "exact", "ratio", "goal", ""], rows)


def _stage(
    stage: str, found: Sequence[tuple[type[Method], Setting | None]], results: Results
) -> Iterator[str]:
    """The methods of a stage, each in a sentence, and all that was measured of them."""
    base = next(cls for cls in reversed(found[0][0].__mro__) if "stage" in vars(cls))
    yield f"## {stage}"
    yield first_sentence(base)
    yield "\n".join(f"- **{kind.__name__}**: {first_sentence(kind)}" for kind, _ in found)
    settings = [setting for _, setting in found if setting is not None]
    if not settings:
        return
    timed = [plan for setting in settings for plan in setting.timed]
    judged = [plan for setting in settings for plan in setting.judged]
    times = _times([DENSE, *timed], results)
    if times:
        yield _table(["plan", "prompt", *_TIMES], times)
    scores = _scores([DENSE, *judged], results)
    if scores:
        yield _table(["plan", "prompt", *results.tasks, "mean, %", "KV held"], scores)


def _times(plans: Iterable[str], results: Results) -> list[list[str]]:
    rows = []
    for plan in plans:
        for length in results.lengths:
            row = results.timing(plan, length)
            if row is not None:
                dense = row["kv_bytes_dense"]
                rows.append(
                    [
                        f"`{plan}`",
                        length_text(length),
                        seconds(row["ttft_s"]["median"]),
                        ratio(row["ttft_ratio"]["median"]),
                        seconds(row["tpot_s"]["median"]),
                        ratio(row["tpot_ratio"]["median"]),
                        mebibytes(row["kv_bytes"]),
                        ratio(row["kv_bytes"] / dense),
                        ratio(row["kv_bytes_peak"] / dense),
                    ]
                )
    return rows


def _scores(plans: Iterable[str], results: Results) -> list[list[str]]:
    rows = []
    for plan in plans:
        for length in results.judged_lengths:
            row = results.quality(plan, length)
            if row is not None:
                rows.append(
                    [
                        f"`{plan}`",
                        length_text(length),
                        *(percent(row["scores"].get(task)) for task in results.tasks),
                        percent(row["score"]),
                        ratio(row["kv_share"]) if row["kv_share"] is not None else NOTHING,
                    ]
                )
    return rows


def first_sentence(kind: type[Method]) -> str:
    """How a class describes itself, up to the first full stop that ends a sentence."""
    text = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=\S\.) ", text, maxsplit=1)[0]


def _paper(paper: str) -> str:
    """A paper's title, linked where it names its arXiv number."""
    return re.sub(r"^(.*) \(arXiv:([\d.]+)\)$", r"[\1](https://arxiv.org/abs/\2)", paper)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def load_results() -> Results:
    """What lies in results/methods.json, empty if nothing does."""
    return Results(json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None)


def load_notes() -> str:
    """What lies in results/methods_notes.md."""
    return NOTES.read_text(encoding="utf-8") if NOTES.exists() else ""


def main() -> None:
    """Write the page, and the picture where there is something to draw."""
    results = load_results()
    PAGE.write_text(page(own_methods(), results, load_notes()), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(HERE.parent)}")
    if results.lengths:
        from methods_plot import PICTURE, draw

        draw(own_methods(), results, PICTURE)
        print(f"wrote {PICTURE.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
