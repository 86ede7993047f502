"""What was measured of the methods, summed up for the record, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from methods_plans import DENSE, FLEXPREFILL, MINFERENCE, QUEST, SETTINGS, SNAPKV
from methods_timing import SHORT, Round
from report import Row, Target
from tamis.bench.results import Answer
from tamis.bench.summary import Summary
from tamis.bench.text import length_text
from timing import Spread


@dataclass(frozen=True)
class Goal:
    """A ratio of the longest prompts' times that must be reached.

    Attributes:
        name: what is compared.
        plans: any of which may reach it.
        pair: the plan's time and the other, of a round.
        bound: the ratio at most.
        scale, unit: of the times.
    """

    name: str
    plans: tuple[str, ...]
    pair: Callable[[Round], tuple[float, float]]
    bound: float
    scale: float
    unit: str

    def row(self, rounds: Sequence[Round], *, judged: bool) -> Row | None:
        """The plan that comes nearest, at the longest prompts; None if none was measured."""
        length = max((one.length for one in rounds), default=0)
        found = []
        for plan in self.plans:
            pairs = [self.pair(r) for r in rounds if (r.plan, r.length) == (plan, length)]
            if pairs:
                sides = zip(*pairs, strict=True)
                ours, theirs = (Spread.of([self.scale * x for x in side]) for side in sides)
                name = f"{self.name}: {plan} at {length_text(length)}"
                target = Target(self.bound) if judged else None
                found.append(Row(name, self.unit, ours, theirs, target=target))
        return min(found, key=lambda row: row.ratio or 0.0, default=None)


GOALS = (
    Goal(
        f"decode against dense at {length_text(SHORT)}",
        (SNAPKV,),
        lambda r: (r.tpot_s, r.short_tpot_s),
        1.2,
        1e3,
        "ms/token",
    ),
    Goal(
        "decode that reads 1/16 of the pages",
        (QUEST,),
        lambda r: (r.tpot_s, r.dense_tpot_s),
        0.4,
        1e3,
        "ms/token",
    ),
    Goal(
        "prefill that computes a part",
        (MINFERENCE, FLEXPREFILL),
        lambda r: (r.ttft_s, r.dense_ttft_s),
        0.5,
        1.0,
        "s",
    ),
)


def goal_rows(rounds: Sequence[Round], *, judged: bool) -> list[Row]:
    """A row per goal that was measured; `judged` says whether it is one to be met."""
    rows = (goal.row(rounds, judged=judged) for goal in GOALS)
    return [row for row in rows if row is not None]


def timing_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Per plan and length: times, their ratios to exact attention's, and bytes, for JSON."""
    groups: dict[tuple[int, str], list[Round]] = {}
    for one in rounds:
        groups.setdefault((one.length, one.plan), []).append(one)

    def spread(values: Callable[[Round], float], group: list[Round]) -> dict[str, float]:
        return asdict(Spread.of([values(one) for one in group]))

    return [
        {
            "plan": plan,
            "length": length,
            "ttft_s": spread(lambda r: r.ttft_s, group),
            "tpot_s": spread(lambda r: r.tpot_s, group),
            "ttft_ratio": spread(lambda r: r.ttft_s / r.dense_ttft_s, group),
            "tpot_ratio": spread(lambda r: r.tpot_s / r.dense_tpot_s, group),
            "kv_bytes": fmean(one.kv_bytes for one in group),
            "kv_bytes_peak": fmean(one.kv_bytes_peak for one in group),
            "kv_bytes_dense": fmean(one.kv_bytes_dense for one in group),
        }
        for (length, plan), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def quality_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Per plan and length: the scores by task, their mean, and the KV kept, for JSON."""
    judged = [plan for setting in SETTINGS for plan in setting.judged]
    summary = Summary(answers, (), first=[DENSE, *judged])
    rows = []
    for length in summary.lengths:
        for plan in summary.plans:
            cells = {task: summary.cell(plan, task, length) for task in summary.tasks}
            memory = summary.memory(plan, length)
            if not any(cell.count or cell.failed for cell in cells.values()):
                continue
            rows.append(
                {
                    "plan": plan,
                    "length": length,
                    "scores": {task: cell.score for task, cell in cells.items()},
                    "score": summary.overall(plan, length),
                    "answers": sum(cell.count for cell in cells.values()),
                    "failed": sum(cell.failed for cell in cells.values()),
                    "kv_share": memory.end / memory.dense if memory else None,
                }
            )
    return rows
