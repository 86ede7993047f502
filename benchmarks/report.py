"""Rows of a comparison: as a table for people, as JSON for the record."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

import tamis
from tamis.cli.machine import Machine, Rates
from timing import Spread

_PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Target:
    """What a row must reach: a bound of its ratio, or of tamis's own value."""

    bound: float
    at_least: bool = False
    of_ratio: bool = True

    def text(self, unit: str) -> str:
        """Such as "≤ 0.3x"."""
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.bound:g}" + ("x" if self.of_ratio else f" {unit}")


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Attributes:
        ours, theirs: of tamis and of the other, where it has such a thing, in `unit`.
        limit: what the machine's measured rates allow, in `unit`.
        higher_is_better: true of rates, false of times and sizes.
    """

    name: str
    unit: str
    ours: Spread
    theirs: Spread | None = None
    limit: float | None = None
    target: Target | None = None
    higher_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """tamis's median over the other's."""
        return self.ours.median / self.theirs.median if self.theirs is not None else None

    @property
    def of_limit(self) -> float | None:
        """The share of the limit that tamis reaches: 1 is as fast as the machine allows."""
        if self.limit is None:
            return None
        share = self.ours.median / self.limit
        return share if self.higher_is_better else 1 / share

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        value = self.ratio if self.target.of_ratio else self.ours.median
        assert value is not None
        return value >= self.target.bound if self.target.at_least else value <= self.target.bound

    def record(self) -> dict[str, Any]:
        """The row for JSON, with everything that follows from it."""
        return asdict(self) | {"ratio": self.ratio, "of_limit": self.of_limit, "met": self.met}


def table(rows: Sequence[Row], other: str) -> Table:
    """The rows, with medians and, in brackets, the least and the greatest sample."""
    result = Table()
    result.add_column("")
    for column in ("tamis", other, "ratio", "limit", "of limit", "target", ""):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            f"{row.name}, {row.unit}",
            _spread(row.ours),
            _spread(row.theirs) if row.theirs is not None else "",
            f"{row.ratio:.2f}x" if row.ratio is not None else "",
            number(row.limit) if row.limit is not None else "",
            f"{row.of_limit:.0%}" if row.of_limit is not None else "",
            row.target.text(row.unit) if row.target is not None else "",
            {None: "", True: "[green]pass[/green]", False: "[bold red]MISS[/bold red]"}[row.met],
        )
    return result


def best_rates(rates: Sequence[Rates]) -> Rates:
    """The highest of each: whatever else runs can only lower them."""
    names = asdict(rates[0])
    return Rates(**{name: max(getattr(rate, name) for rate in rates) for name in names})


def number(value: float) -> str:
    """Three significant digits, or all of the whole part."""
    if value == 0:
        return "0"
    for bound, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(value) >= bound:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def save(
    path: Path,
    benchmark: str,
    machine: Machine,
    rates: Rates,
    settings: dict[str, Any],
    rows: Sequence[Row],
) -> None:
    """Write everything that is needed to read the rows later."""
    record = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "versions": {"python": platform.python_version(), "tamis": tamis.__version__}
        | {name: version(name) for name in _PACKAGES},
        "rates": asdict(rates),
        "settings": settings,
        "rows": [row.record() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )


def _spread(spread: Spread) -> str:
    if spread.n == 1:
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)} .. {number(spread.high)})"
