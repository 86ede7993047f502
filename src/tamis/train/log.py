"""The run's log: one JSON line per report, and the curves drawn from it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All records; where a killed run was resumed, only those of the run that went on count."""
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def draw(records: list[dict[str, Any]], path: Path) -> bool:
    """Draw losses, first-answer-token accuracies and speed.

    False if there is nothing to draw yet, or matplotlib is not installed.
    """
    if not records:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, losses, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])
    tasks = sorted({task for record in records for task in record["first"]})
    for task in tasks:
        points = [(r["step"], r["first"][task]) for r in records if task in r["first"]]
        accuracy.plot(*zip(*points, strict=True), label=task.replace("_", " "), linewidth=1.2)
    accuracy.set_ylabel("first-answer-token accuracy")
    accuracy.set_ylim(0, 1.02)
    accuracy.legend(fontsize=8, loc="lower right")
    losses.plot(steps, [record["answer_loss"] for record in records], label="answers (weighted)")
    losses.plot(steps, [record["text_loss"] for record in records], label="library text")
    losses.set_ylabel("loss, nats per token")
    losses.legend(fontsize=8)
    speed.plot(steps, [record["tokens_per_s"] for record in records], color="gray")
    speed.set_ylabel("tokens / s")
    speed.set_xlabel("step")
    for before, after in itertools.pairwise(records):
        if before["length"] != after["length"]:
            for axes in (accuracy, losses, speed):
                axes.axvline(after["step"], color="black", linewidth=0.6, linestyle=":")
            accuracy.text(after["step"], 0.02, f" {after['length']}", fontsize=8)
    figure.savefig(path, dpi=120)
    return True
