"""What a page is: a fixed number of tokens of one KV head of one layer, stored field by field.

A page is one run of bytes in the arena. Each *field* occupies rows of `width` elements: one row
per token (the keys, the values, the absolute positions, a method's side columns) or a fixed number
of rows per page (its summary, the scales of its token groups). Because all of them lie in the page
itself, copying, sharing or swapping a page is copying its bytes, whatever it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from tamis.errors import ConfigError

UNIT = 64
"""Pages start on multiples of UNIT bytes. A page id is its byte offset in the arena over UNIT, so
one int32 id addresses pages of every format in an arena of up to 128 GiB."""


def align(n_bytes: int) -> int:
    """Round `n_bytes` up to a multiple of UNIT."""
    return -(-n_bytes // UNIT) * UNIT


@dataclass(frozen=True)
class Field:
    """Rows of `width` elements of `dtype`.

    Attributes:
        name: what the field is called; a page has one field of a name.
        dtype: of the elements.
        width: elements per row.
        rows: rows per page; None for one row per token of the page.
    """

    name: str
    dtype: torch.dtype
    width: int
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or (self.rows is not None and self.rows < 1):
            raise ConfigError(
                f"field {self.name!r} has width {self.width} and rows {self.rows}; "
                "both must be at least 1, or rows None for one per token"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    def rows_in(self, page_size: int) -> int:
        """Rows in a page of `page_size` tokens."""
        return page_size if self.rows is None else self.rows


@dataclass(frozen=True)
class PageFormat:
    """The layout of a page of `page_size` tokens: field after field, UNIT-aligned."""

    page_size: int
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        if self.page_size < 1 or not names or len(set(names)) < len(names):
            raise ConfigError(
                f"a page of {self.page_size} tokens with the fields {names} is impossible; "
                "it needs at least one token and at least one field, and names that differ"
            )

    @classmethod
    def dense(cls, page_size: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> PageFormat:
        """Exact K and V in `dtype`, with the absolute position (int32) of each token."""
        return cls(
            page_size,
            (
                Field("k", dtype, k_dim),
                Field("v", dtype, v_dim),
                Field("position", torch.int32, 1),
            ),
        )

    def extended(self, fields: tuple[Field, ...]) -> PageFormat:
        """This format with further fields after its own, whose offsets stay as they are.

        Whatever reads pages of this format reads pages of the extended one just as well.
        """
        return PageFormat(self.page_size, self.fields + fields) if fields else self

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each field's first row from the start of the page."""
        offsets, at = {}, 0
        for field in self.fields:
            offsets[field.name] = at
            at += self._field_bytes(field)
        return offsets

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page, padding included: what the pool accounts for."""
        return sum(self._field_bytes(field) for field in self.fields)

    def field(self, name: str) -> Field:
        """The field called `name`; KeyError if the format has none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    def pages_for(self, n_tokens: int) -> int:
        """Pages that hold `n_tokens` tokens of one head."""
        return -(-n_tokens // self.page_size)

    def n_ids(self, data: torch.Tensor) -> int:
        """One more than the greatest id that a page could have in an arena's bytes, uint8
        [capacity]."""
        return max(0, (data.numel() - self.page_bytes) // UNIT + 1)

    def view(self, data: torch.Tensor, name: str) -> torch.Tensor:
        """All possible pages' rows of one field, indexed by page id.

        Args:
            data: the arena's bytes, uint8 [capacity].
            name: the field.

        Returns:
            A view (no copy) `[page ids, rows, width]` of the field's dtype: `view[id, row]` is
            row `row` of page `id`, and `rows` is page_size for a field with a row per token. Only
            ids of pages of this format are meaningful.
        """
        field = self.field(name)
        flat = data.view(field.dtype)
        return flat.as_strided(
            (self.n_ids(data), field.rows_in(self.page_size), field.width),
            (UNIT // field.dtype.itemsize, field.width, 1),
            flat.storage_offset() + self.offsets[name] // field.dtype.itemsize,
        )

    def _field_bytes(self, field: Field) -> int:
        """Bytes of one field in a page, padding included."""
        return align(field.rows_in(self.page_size) * field.row_bytes)


@dataclass(frozen=True)
class PagedKV:
    """The pages of a batch of sequences at one layer: what attention kernels read.

    Attributes:
        data: the arena's bytes, uint8 [capacity], UNIT-aligned.
        format: the layout of every page named in `tables`.
        tables: page ids, int32 [n, kv_heads, max_pages]; the last dimension is contiguous, the
            others may be strided. Entries past a head's last page are unspecified.
        lengths: cached tokens per head, int32 [n, kv_heads]. Token `i` of a head is row
            `i % page_size` of its page `i // page_size`; positions ascend with `i` wherever a
            window is asked for.
    """

    data: torch.Tensor
    format: PageFormat
    tables: torch.Tensor
    lengths: torch.Tensor
