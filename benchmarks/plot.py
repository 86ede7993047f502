"""The picture in the README, from the results of `benchmarks/engine.py`.

    python benchmarks/plot.py            # results/engine.json -> docs/engine.svg

Needs matplotlib (`pip install 'tamis[bench]'`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine.json"
PICTURE = HERE.parent / "docs" / "engine.svg"
SERIES = (("ours", "tamis", "#0b6e4f"), ("theirs", "Transformers", "#b3541e"))


def draw(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    """One measure over the length of the context, with the machine's limit."""
    contexts = [int(re.sub(r"\D", "", row["name"])) for row in rows]
    for key, label, colour in SERIES:
        medians = [row[key]["median"] for row in rows]
        axes.plot(contexts, medians, marker="o", color=colour, label=label)
        axes.annotate(
            f"{medians[-1]:.3g}",
            (contexts[-1], medians[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    limits = [row["limit"] for row in rows]
    axes.plot(contexts, limits, color="#777777", linestyle=":", label="limit of the machine")
    axes.set(title=title, xlabel="tokens of context", xscale="log", yscale="log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw prefill and decode side by side."""
    results = json.loads(RESULTS.read_text())
    rows: list[dict[str, Any]] = results["rows"]
    plt.rcParams |= {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "tamis"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    draw(left, [r for r in rows if r["name"].startswith("decode")], "decode, ms per token")
    draw(right, [r for r in rows if r["name"].startswith("prefill")], "prefill, seconds")
    right.legend(frameon=False)
    machine = results["machine"]
    figure.supxlabel(
        f"27 M-parameter Llama in bf16, {machine['cores']}-core {machine['cpu']}, "
        f"{results['date'][:10]}",
        fontsize=8,
        color="#555555",
    )
    figure.savefig(PICTURE, metadata={"Date": None})
    print(f"wrote {PICTURE.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
