"""A format lays out rows per token and rows per page, and extends without moving anything."""

from __future__ import annotations

import pytest
import torch

from tamis.cache import Field, PageFormat
from tamis.errors import ConfigError

DENSE = PageFormat.dense(4, 8, 6, torch.float32)
SCORE = Field("score", torch.float32, 1)
BOUND = Field("bound", torch.float32, 8, rows=2)


def test_an_extended_format_leaves_its_fields_where_they_are() -> None:
    extended = DENSE.extended((SCORE, BOUND))
    assert {name: extended.offsets[name] for name in DENSE.offsets} == DENSE.offsets
    assert extended.page_bytes == DENSE.page_bytes + 64 + 2 * 8 * 4
    assert DENSE.extended(()) == DENSE


def test_a_view_has_a_fields_own_rows() -> None:
    extended = DENSE.extended((SCORE, BOUND))
    data = torch.zeros(2 * extended.page_bytes, dtype=torch.uint8)
    views = {field.name: extended.view(data, field.name) for field in extended.fields}
    assert views["k"].shape[1:] == (4, 8)
    assert views["score"].shape[1:] == (4, 1)
    assert views["bound"].shape[1:] == (2, 8)
    second = extended.page_bytes // 64
    for i, view in enumerate(views.values()):
        view[second] = i + 1
    for i, view in enumerate(views.values()):  # no field overlaps another
        assert (view[second] == i + 1).all()
        assert not view[0].any()


def test_kernels_read_extended_pages_through_the_plain_format() -> None:
    extended = DENSE.extended((SCORE,))
    data = torch.zeros(extended.page_bytes, dtype=torch.uint8)
    extended.view(data, "v")[0] = torch.arange(24.0).view(4, 6)
    assert torch.equal(DENSE.view(data, "v")[0], torch.arange(24.0).view(4, 6))


@pytest.mark.parametrize(("width", "rows"), [(0, None), (3, 0), (-1, 2)])
def test_a_field_has_at_least_one_element(width: int, rows: int | None) -> None:
    with pytest.raises(ConfigError, match=f"'x' has width {width} and rows {rows}"):
        Field("x", torch.float32, width, rows)


def test_a_page_has_one_field_of_a_name() -> None:
    with pytest.raises(ConfigError, match=r"'position', 'k'.*names that differ"):
        DENSE.extended((Field("k", torch.float32, 1),))
    with pytest.raises(ConfigError, match="a page of 0 tokens"):
        PageFormat(0, (SCORE,))
