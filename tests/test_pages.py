"""The pages that tamis writes and serves hold their styles themselves, and share them."""

from __future__ import annotations

import re

import pytest

from tamis.pages import environment

SHEETS = [
    ("tamis.bench", "report.css", ["base.css"]),
    ("tamis.inspection", "page.css", ["base.css", "dark.css"]),
    ("tamis.server", "dashboard.css", ["base.css", "dark.css"]),
]


@pytest.mark.parametrize(("package", "name", "shared"), SHEETS)
def test_a_sheet_begins_with_the_shared_ones_and_needs_nobody(
    package: str, name: str, shared: list[str]
) -> None:
    templates = environment(package)
    sheet = templates.get_template(name).render()
    begin = "".join(templates.get_template(one).render() for one in shared)
    assert sheet.startswith(begin)
    assert len(sheet) > len(begin)
    assert "url(" not in sheet
    assert "@import" not in sheet


@pytest.mark.parametrize(("package", "name", "shared"), SHEETS)
def test_every_colour_that_a_sheet_uses_is_defined(
    package: str, name: str, shared: list[str]
) -> None:
    sheet = environment(package).get_template(name).render()
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", sheet))
    set_by_elements = {"--score", "--share"}
    assert used - set_by_elements <= set(re.findall(r"(--[a-z0-9]+):", sheet))
