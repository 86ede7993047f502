"""The report: one HTML file that shows everything a run measured, without a network."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from tamis.bench.figures import styles
from tamis.bench.record import Record
from tamis.bench.sections import overview, sections
from tamis.bench.summary import Summary
from tamis.errors import ConfigError


def check_writable(path: Path) -> None:
    """Make sure, before a long run, that a report can be written to `path` after it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write the report to {path}: {error.strerror}") from error


def write_report(path: Path, record: Record, summary: Summary, depths: int) -> None:
    """Write the report, whole or not at all.

    Args:
        depths: parts of the document that the heatmaps tell apart.

    Raises:
        ConfigError: it cannot be written.
    """
    html = render(record, summary, depths)
    try:
        partial = _partial(path)
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"cannot write the report to {path}: {error.strerror}") from error


def render(record: Record, summary: Summary, depths: int) -> str:
    """The report as HTML; it requests nothing, and its own policy forbids it to."""
    environment = Environment(
        loader=PackageLoader("tamis.bench"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        record=record,
        title=PurePath(record.settings.model).name,
        overview=overview(summary),
        sections=sections(summary, depths),
        plans=[(plan, styles(summary.plans)[plan]) for plan in summary.plans],
        failed=summary.failed,
        plotly=get_plotlyjs(),
    )


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
