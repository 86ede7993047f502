"""The picture on the methods page: time, memory and score of every method, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from methods_plans import BUDGETS, DENSE, SETTINGS, Setting
from tamis.bench.text import length_text
from tamis.methods.base import STAGES, Method

if TYPE_CHECKING:
    from methods_page import Results

PICTURE = Path(__file__).parent.parent / "docs" / "methods.svg"
_LESS, _MORE, _EXACT = "#0b6e4f", "#b3541e", "#777777"
_SHADES = ("#9fd3c0", "#4da184", "#0b6e4f")
_FIXED = "#444444"
_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_APART = 0.24  # of the dots of one method
_LEFT = 0.02  # where the bars of nothing at all begin
_RIGHT = 10  # where bars that are longer are cut off; their number is beside them


def draw(kinds: Mapping[str, type[Method]], results: Results, path: Path) -> None:
    """Draw the methods that were measured, in the order of the stages, to an SVG file."""
    settings = [s for s in SETTINGS if s.method in kinds and results.timing(s.timed[0])]
    timings = [timing for s in settings if (timing := results.timing(s.timed[0]))]
    plt.rcParams |= {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "tamis"}
    figure, axes = plt.subplots(
        1, 4, figsize=(11, 0.24 * len(settings) + 1.2), sharey=True, layout="constrained"
    )
    where = f"× exact, {length_text(max(results.lengths))}"  # noqa: RUF001
    _bars(axes[0], [t["ttft_ratio"]["median"] for t in timings], f"first token, {where}")
    _bars(axes[1], [t["tpot_ratio"]["median"] for t in timings], f"each token, {where}")
    _bars(axes[2], [t["kv_bytes"] / t["kv_bytes_dense"] for t in timings], f"KV held, {where}")
    _dots(axes[3], settings, results)
    axes[0].set_yticks(range(len(settings)), [kinds[s.method].__name__ for s in settings])
    axes[0].set_ylim(len(settings) - 0.4, -0.6)
    stages = [STAGES.index(kinds[s.method].stage) for s in settings]
    for ax in axes:
        for place, (one, other) in enumerate(pairwise(stages)):
            if one != other:
                ax.axhline(place + 0.5, color="#dddddd", linewidth=0.8)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Axes, values: Sequence[float], title: str) -> None:
    """Ratios on a logarithmic axis, from 1 to the left where they are less."""
    for row, value in enumerate(values):
        shown = min(max(value, _LEFT), _RIGHT)
        colour = _LESS if value <= 1 else _MORE
        axes.barh(row, shown - 1, left=1, height=0.62, color=colour)
        axes.annotate(
            f"{value:.2f}" if value <= _RIGHT else f"→ {value:.0f}",
            (shown, row),
            xytext=(3 if value > 1 else -3, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value > 1 else "right",
            fontsize=7,
            color="#444444",
        )
    axes.set_xscale("log")
    low, high = min([*values, 0.5]), max([*values, 1.2])
    axes.set_xlim(max(low, _LEFT) * 0.45, min(high, _RIGHT) * 1.9)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color=_EXACT, linewidth=0.8)
    axes.set_title(title, fontsize=9)


def _dots(axes: Axes, settings: Sequence[Setting], results: Results) -> None:
    """Scores in percent: three of methods that have a budget, one of the others."""
    for row, setting in enumerate(settings):
        marker, shades = ("o", _SHADES) if setting.budgeted else ("D", (_FIXED,))
        for place, (plan, shade) in enumerate(zip(setting.judged, shades, strict=True)):
            score = results.score(plan)
            if score is not None:  # beside one another, so that equal scores stay visible
                height = row + _APART * (place - (len(shades) - 1) / 2)
                axes.plot(100 * score, height, marker, color=shade, markersize=4)
    dense = results.score(DENSE)
    if dense is not None:
        axes.axvline(100 * dense, color=_EXACT, linewidth=0.8)
    for share, shade in zip(BUDGETS, _SHADES, strict=True):
        axes.plot([], [], "o", color=shade, markersize=5, label=f"{100 * share:.0f} %")
    axes.plot([], [], "D", color=_FIXED, markersize=5, label="has none")
    axes.set_xlim(-3, 103)
    if results.judged_lengths:
        axes.set_title(f"score, %, {results.judged_text}", fontsize=9)
    axes.legend(
        title="budget", frameon=False, fontsize=7, title_fontsize=7, loc="upper left",
        bbox_to_anchor=(1, 1),
    )  # fmt: skip
