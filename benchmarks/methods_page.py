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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from methods_plans import BUDGETS, DENSE, SETTINGS, Setting
from report import number
from tamis.bench.text import NOTHING, length_text, mebibytes, percent, ratio, seconds
from tamis.cli.methods import describe
from tamis.methods.base import Method
from tamis.methods.registry import methods

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods.json"
NOTES = HERE / "results" / "methods_notes.md"
PAGE = HERE.parent / "docs" / "methods.md"

Row = Mapping[str, Any]


class Results:
    """The summary that `benchmarks/methods.py` writes, to be looked up; empty without one.

    Attributes:
        lengths, judged_lengths: tokens of the prompts that were timed and judged, ascending.
        tasks: that were judged.
    """

    def __init__(self, summary: Row | None) -> None:
        self.summary = summary or {"timings": [], "quality": [], "goals": []}
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

    def quality(self, plan: str, length: int | None = None) -> Row | None:
        """Of a plan at a length, by default the longest; None where it was not judged."""
        return self._quality.get((plan, length or max(self.judged_lengths, default=0)))


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
        parts += _stage(stage, [(kinds[name], settings[name]) for name in names], results)
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
        "Llama of random weights in bf16 with one request at a time, and relative to exact "
        "attention on the same prompt, computed beside it. Random weights attend to everything "
        "alike, so what adapts to the attention finds nothing to leave out there. The table of "
        "each stage says how a method was set; of several timed plans the first stands for it.",
    ]
    if results.summary.get("date"):
        machine, versions = results.summary["machine"], results.summary["versions"]
        asked = results.summary["settings"]
        lines += [
            "",
            f"Measured {results.summary['date']} on {machine['processor']} "
            f"({machine['instruction sets']}), "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f"; {asked['samples']} documents per task and length.",
            "",
            "![time, memory and score of every method](methods.svg)",
        ]
    return "\n".join(lines)


def _overview(
    kinds: Mapping[str, type[Method]], settings: Mapping[str, Setting], results: Results
) -> str:
    """A row per method, at the longest prompts."""
    head = ["method", "stage", "paper", "parameters", "score", "KV held", "first token"]
    rows = [_overview_row(DENSE, "", "", "", DENSE, (DENSE,), results)]
    for name, kind in kinds.items():
        setting = settings[name]
        facts = describe(kind)
        given = ", ".join(f"{one['name']}={one['default']!r}" for one in facts["parameters"])
        link = f"[{kind.__name__}](#{kind.stage})"
        parameters = f"`{given}`" if given else ""
        paper = _paper(kind.paper)
        rows.append(
            _overview_row(
                link, kind.stage, paper, parameters, setting.timed[0], setting.judged, results
            )
        )
    title = "## All of them"
    if results.lengths and results.judged_lengths:
        timed, judged = (max(some) for some in (results.lengths, results.judged_lengths))
        title += (
            f", with prompts of {length_text(timed)} tokens for time and memory, "
            f"{length_text(judged)} for scores"
        )
    return f"{title}\n\n" + _table([*head, "each token"], rows)


def _overview_row(
    name: str,
    stage: str,
    paper: str,
    parameters: str,
    timed: str,
    judged: Sequence[str],
    results: Results,
) -> list[str]:
    scores = [results.quality(plan) for plan in judged]
    timing = results.timing(timed)
    return [
        name,
        stage,
        paper,
        parameters,
        " / ".join(percent(row["score"]) if row else NOTHING for row in scores),
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
    stage: str, found: Sequence[tuple[type[Method], Setting]], results: Results
) -> Iterator[str]:
    """The methods of a stage, each in a sentence, and all that was measured of them."""
    base = next(cls for cls in reversed(found[0][0].__mro__) if "stage" in vars(cls))
    yield f"## {stage}"
    yield first_sentence(base)
    yield "\n".join(f"- **{kind.__name__}**: {first_sentence(kind)}" for kind, _ in found)
    timed = [plan for _, setting in found for plan in setting.timed]
    judged = [plan for _, setting in found for plan in setting.judged]
    times = _times(timed, results)
    if times:
        yield _table(
            ["plan", "prompt", "first token", "", "each token", "", "KV held, MiB", "", "peak"],
            times,
        )
    scores = _scores([DENSE, *judged], results)
    if scores:
        yield _table(["plan", "prompt", *results.tasks, "mean", "KV held"], scores)


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
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0]


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
