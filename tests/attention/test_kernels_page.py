"""docs/kernels.md names what the attention package can do, and nothing that it cannot."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from tamis import attention

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def rows() -> set[tuple[str, str]]:
    """The functions of the page's table, with the option that a row is about, or ""."""
    names = re.findall(r"`attention\.([\w.]+)(?:\((\w+)=.*?\))?`", PAGE.read_text())
    also = re.findall(r"^\| `attention\.observe\.\w+`, (.*?) \|", PAGE.read_text(), re.MULTILINE)
    return {*names, *((f"observe.{n}", "") for line in also for n in re.findall(r"`(\w+)`", line))}


def test_every_function_has_a_row() -> None:
    public = {name for name in attention.__all__ if name not in ("backends", "observe")}
    public |= {f"observe.{name}" for name in attention.observe.__all__}

    assert {name for name, _ in rows()} == public


def test_every_option_with_a_row_of_its_own_exists() -> None:
    options = {row for row in rows() if row[1]}

    assert options == {("prefill", "own"), ("prefill", "pattern"), ("decode", "tokens")}
    for name, option in options:
        assert option in inspect.signature(getattr(attention, name)).parameters
