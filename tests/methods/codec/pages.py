"""What every codec's and every share's fields are held to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tamis.methods.views import Column


def bytes_per_token(columns: Sequence[Column], page_size: int) -> float:
    """Bytes of one token of one head, its share of the fields per page included."""
    rows = ((page_size if c.rows is None else c.rows) * c.width * c.dtype.itemsize for c in columns)
    return sum(rows) / page_size


def assert_declared(
    fields: dict[str, Tensor], columns: Sequence[Column], leading: tuple[int, ...], tokens: int
) -> None:
    """The fields are the declared ones: names, types and shapes [*leading, rows, width]."""
    declared = {
        c.name: (c.dtype, (*leading, tokens if c.rows is None else c.rows, c.width))
        for c in columns
    }
    assert {name: (x.dtype, tuple(x.shape)) for name, x in fields.items()} == declared
