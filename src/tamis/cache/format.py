"""What a page is: a fixed number of tokens of one KV head of one layer, stored field by field.

A page is one run of bytes in the arena. Each *field* (the keys, the values, the absolute
positions, and whatever a method adds per token) occupies `page_size` rows of `width` elements.
Because positions and side columns lie in the page itself, copying, sharing or swapping a page is
copying its bytes, whatever it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

UNIT = 64
"""Pages start on multiples of UNIT bytes. A page id is its byte offset in the arena over UNIT, so
one int32 id addresses pages of every format in an arena of up to 128 GiB."""


def align(n_bytes: int) -> int:
    """Round `n_bytes` up to a multiple of UNIT."""
    return -(-n_bytes // UNIT) * UNIT


@dataclass(frozen=True)
class Field:
    """One value per token: `width` elements of `dtype`."""

    name: str
    dtype: torch.dtype
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class PageFormat:
    """The layout of a page: `page_size` rows of each field, field after field, UNIT-aligned."""

    page_size: int
    fields: tuple[Field, ...]

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

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each field's first row from the start of the page."""
        offsets, at = {}, 0
        for field in self.fields:
            offsets[field.name] = at
            at += align(self.page_size * field.row_bytes)
        return offsets

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page, padding included: what the pool accounts for."""
        return sum(align(self.page_size * field.row_bytes) for field in self.fields)

    def field(self, name: str) -> Field:
        """The field called `name`; KeyError if the format has none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    def pages_for(self, n_tokens: int) -> int:
        """Pages that hold `n_tokens` tokens of one head."""
        return -(-n_tokens // self.page_size)

    def view(self, data: torch.Tensor, name: str) -> torch.Tensor:
        """All possible pages' rows of one field, indexed by page id.

        Args:
            data: the arena's bytes, uint8 [capacity].
            name: the field.

        Returns:
            A view (no copy) `[page ids, page_size, width]` of the field's dtype: `view[id, row]`
            is token `row` of page `id`. Only ids of pages of this format are meaningful.
        """
        field = self.field(name)
        flat = data.view(field.dtype)
        n_ids = max(0, (data.numel() - self.page_bytes) // UNIT + 1)
        return flat.as_strided(
            (n_ids, self.page_size, field.width),
            (UNIT // field.dtype.itemsize, field.width, 1),
            flat.storage_offset() + self.offsets[name] // field.dtype.itemsize,
        )


@dataclass(frozen=True)
class PagedKV:
    """The pages of a batch of sequences at one layer: what attention kernels read.

    Attributes:
        data: the arena's bytes, uint8 [capacity], UNIT-aligned.
        format: the layout of every page named in `tables`.
        tables: page ids, int32 [n, kv_heads, max_pages]; the last dimension is contiguous, the
            others may be strided. Entries past a head's last page are unspecified.
        lengths: cached tokens per head, int32 [n, kv_heads]. Token `i` of a head is row
            `i % page_size` of its page `i // page_size`; positions ascend with `i`.
    """

    data: torch.Tensor
    format: PageFormat
    tables: torch.Tensor
    lengths: torch.Tensor
