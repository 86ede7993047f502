"""The picture on the page of performance: prefill and decode over the length of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from peers_roster import LLAMA_CPP, TAMIS, TRANSFORMERS
from tamis.bench.text import length_text

PICTURE = Path(__file__).parent.parent / "docs" / "performance.svg"
LINES = {
    TAMIS: ("#0b6e4f", "-"),
    "tamis, snapkv": ("#0b6e4f", "--"),
    "tamis, kivi 4-bit": ("#4da184", "--"),
    "tamis, minference + snapkv": ("#4da184", "-."),
    TRANSFORMERS: ("#b3541e", "-"),
    "kvpress, SnapKV": ("#b3541e", "--"),
    LLAMA_CPP: ("#3b5b92", "-"),
    "llama.cpp, q4_0 KV": ("#3b5b92", "--"),
}
"""Who is drawn, in which colour and stroke."""
_STEPS = {"prefill_s": ("prefill, s", 1.0), "decode_s": ("decode, ms per token", 1e3)}


def draw(series: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the summary's rows to an SVG file: a line of plots per model."""
    models = list(dict.fromkeys(row["model"] for row in series))
    plt.rcParams |= {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "tamis"}
    figure, grid = plt.subplots(
        len(models), 2, figsize=(9, 3.4 * len(models)), layout="constrained", squeeze=False
    )
    for model, line in zip(models, grid, strict=True):
        rows = [row for row in series if row["model"] == model]
        for axes, (what, (title, scale)) in zip(line, _STEPS.items(), strict=True):
            _lines(axes, rows, what, scale)
            axes.set(title=f"{model}: {title}", xlabel="tokens of context")
    handles = {h.get_label(): h for axes in grid.flat for h in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _lines(axes: Axes, rows: Sequence[Mapping[str, Any]], what: str, scale: float) -> None:
    for engine, (colour, stroke) in LINES.items():
        points = [
            (row["tokens"], scale * row[what]["median"]) for row in rows if row["engine"] == engine
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                stroke,
                marker="o",
                markersize=4,
                color=colour,
                label=engine,
            )
    limits = [(row["tokens"], scale * row["limit"][what]) for row in rows if row["engine"] == TAMIS]
    if limits:
        axes.plot(*zip(*limits, strict=True), ":", color="#777777", label="limit of the machine")
    ticks = sorted({row["tokens"] for row in rows})
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(ticks, [length_text(tick) for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
