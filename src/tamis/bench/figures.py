"""The report's figures, as HTML fragments that plotly.js draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html

from tamis.bench.summary import pareto_front

_INK, _MUTED, _GRID = "#2b3440", "#6b7785", "#e6e9ed"
_COLOURS = (
    "#2f6f8f",
    "#c26a3d",
    "#5b8c5a",
    "#8a5a9e",
    "#b08a2e",
    "#4f5d95",
    "#b0546b",
    "#3f8f84",
)
_DENSE = "#39424e"
_SYMBOLS = (
    ("circle", "●"),
    ("square", "■"),
    ("diamond", "◆"),
    ("triangle-up", "▲"),
    ("triangle-down", "▼"),
    ("star", "★"),
    ("cross", "✚"),
)
_SCORES = [[0.0, "#f7f2ec"], [0.5, "#a9cbd0"], [1.0, "#2f7f86"]]
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'


@dataclass(frozen=True)
class Style:
    """How a plan looks in every figure: colour, plotly's name of the mark, the mark as a sign."""

    colour: str
    symbol: str
    sign: str


@dataclass(frozen=True)
class Point:
    """A plan's quality and what it costs; `low` and `high` are the range of repeated costs."""

    plan: str
    cost: float
    quality: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """KV memory of a plan over time: seconds, MiB, and the seconds of the first token."""

    plan: str
    seconds: Sequence[float]
    mebibytes: Sequence[float]
    first_token: float


def styles(plans: Sequence[str]) -> dict[str, Style]:
    """A style per plan: dense is dark, the others differ in colour and mark."""
    found: dict[str, Style] = {}
    others = [plan for plan in plans if plan != "dense"]
    for i, plan in enumerate(others, start=1):
        symbol, sign = _SYMBOLS[i % len(_SYMBOLS)]
        found[plan] = Style(_COLOURS[(i - 1) % len(_COLOURS)], symbol, sign)
    return {"dense": Style(_DENSE, *_SYMBOLS[0]), **found}


def tradeoff(name: str, points: Sequence[Point], cost: str, look: Mapping[str, Style]) -> str:
    """Quality against a cost, with the Pareto front as a stepped line.

    Args:
        name: of the HTML element. `cost`: the title of the axis.
    """
    figure = go.Figure()
    front = pareto_front([(point.cost, point.quality) for point in points])
    best = sorted((p for p, on in zip(points, front, strict=True) if on), key=lambda p: p.cost)
    figure.add_trace(
        go.Scatter(
            x=[point.cost for point in best],
            y=[100 * point.quality for point in best],
            mode="lines",
            line={"color": _MUTED, "width": 1.5, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
        )
    )
    for point, on_front in zip(points, front, strict=True):
        style = look[point.plan]
        error: dict[str, Any] | None = None
        if point.low is not None and point.high is not None:
            error = {
                "array": [point.high - point.cost],
                "arrayminus": [point.cost - point.low],
                "symmetric": False,
                "thickness": 1,
                "width": 3,
            }
        figure.add_trace(
            go.Scatter(
                x=[point.cost],
                y=[100 * point.quality],
                error_x=error,
                mode="markers",
                marker={
                    "symbol": style.symbol if on_front else f"{style.symbol}-open",
                    "color": style.colour,
                    "size": 12 if on_front else 10,
                    "line": {"width": 1.5, "color": "#fff" if on_front else style.colour},
                },
                hovertemplate=f"{_escape(point.plan)}<br>%{{x:.3~g}}, %{{y:.1f}} %<extra></extra>",
            )
        )
    figure.update_xaxes(title_text=cost, rangemode="tozero")
    figure.update_yaxes(title_text="score, %", range=[-4, 104])
    return _html(figure, name)


def heatmap(name: str, rows: Sequence[str], columns: Sequence[str], grid: Sequence[Any]) -> str:
    """Scores (0 to 1, None for nothing) of one plan: needle depth downward, length across."""
    percents = [[None if z is None else 100 * z for z in row] for row in grid]
    figure = go.Figure(
        go.Heatmap(
            z=percents,
            x=list(columns),
            y=list(rows),
            zmin=0,
            zmax=100,
            colorscale=_SCORES,
            showscale=False,
            xgap=2,
            ygap=2,
            texttemplate="%{z:.0f}",
            hovertemplate="%{x}, depth %{y}: %{z:.1f} %<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_xaxes(title_text="document, tokens", type="category", showgrid=False)
    figure.update_yaxes(
        title_text="depth, %", type="category", autorange="reversed", showgrid=False
    )
    return _html(figure, name, height=110 + 34 * len(rows))


def timeline(name: str, lines: Sequence[Line], look: Mapping[str, Style]) -> str:
    """KV memory over the life of one request; a mark stands where its first token came."""
    figure = go.Figure()
    for line in lines:
        style = look[line.plan]
        label = _escape(line.plan)
        figure.add_trace(
            go.Scatter(
                x=list(line.seconds),
                y=list(line.mebibytes),
                mode="lines",
                line={"color": style.colour, "width": 2},
                hovertemplate=f"{label}<br>%{{x:.3~g}} s: %{{y:.3~g}} MiB<extra></extra>",
            )
        )
        at = max(i for i, s in enumerate(line.seconds) if i == 0 or s <= line.first_token * 1.001)
        figure.add_trace(
            go.Scatter(
                x=[line.seconds[at]],
                y=[line.mebibytes[at]],
                mode="markers",
                marker={"color": style.colour, "symbol": style.symbol, "size": 10},
                hovertemplate=f"{label}<br>first token<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="seconds", rangemode="tozero")
    figure.update_yaxes(title_text="KV memory, MiB", rangemode="tozero")
    return _html(figure, name)


def _html(figure: go.Figure, name: str, height: int = 300) -> str:
    figure.update_layout(
        template="none",
        showlegend=False,
        height=height,
        margin={"l": 58, "r": 14, "t": 10, "b": 46},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": _FONT, "size": 13, "color": _INK},
        dragmode=False,
        hoverlabel={"bgcolor": "#fff", "font": {"color": _INK}},
    )
    axes = {"gridcolor": _GRID, "zeroline": False, "fixedrange": True, "automargin": True}
    title = {"font": {"size": 13, "color": _MUTED}, "standoff": 8}
    figure.update_xaxes(**axes, linecolor=_GRID, ticks="", title=title)
    figure.update_yaxes(**axes, ticks="", title=title)
    return str(
        to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=name,
            default_height=f"{height}px",
            config={"displayModeBar": False, "responsive": True},
        )
    )


def _escape(text: str) -> str:
    """Text as it is: plotly reads tags, and placeholders in percent signs and braces."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
