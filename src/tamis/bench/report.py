"""The report: one HTML file that shows everything a run measured, without a network."""

from __future__ import annotations

from pathlib import Path, PurePath

from plotly.offline import get_plotlyjs

from tamis import files, pages
from tamis.bench.figures import styles
from tamis.bench.record import Record
from tamis.bench.sections import overview, sections
from tamis.bench.summary import Summary


def check_writable(path: Path) -> None:
    """Make sure, before a long run, that a report can be written to `path` after it.

    Raises:
        ConfigError: it cannot.
    """
    files.check_writable(path, "the report")


def write_report(path: Path, record: Record, summary: Summary, depths: int) -> None:
    """Write the report, whole or not at all.

    Args:
        depths: parts of the document that the heatmaps tell apart.

    Raises:
        ConfigError: it cannot be written.
    """
    files.write_whole(path, render(record, summary, depths), "the report")


def render(record: Record, summary: Summary, depths: int) -> str:
    """The report as HTML; it requests nothing, and its own policy forbids it to."""
    template = pages.environment("tamis.bench").get_template("report.html.j2")
    return template.render(
        record=record,
        title=PurePath(record.settings.model).name,
        overview=overview(summary),
        sections=sections(summary, depths),
        plans=[(plan, styles(summary.plans)[plan]) for plan in summary.plans],
        failed=summary.failed,
        plotly=get_plotlyjs(),
    )
