"""Random pages on a device, for the checks and the timings of `gpu.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tamis.cache.format import Field, PagedKV, PageFormat
from tamis.methods.base import Codec

PAGE_SIZE = 64


def dense_pages(
    lengths: Sequence[Sequence[int]],
    dim: int,
    dtype: torch.dtype,
    device: str,
    *,
    columns: Sequence[Field] = (),
) -> PagedKV:
    """Pages of random tokens, `lengths[row][head]` of them, in random order; further fields are
    random too. Token `i` has position `i`."""
    format = PageFormat.dense(PAGE_SIZE, dim, dim, dtype).extended(tuple(columns))
    counts = [[format.pages_for(length) for length in row] for row in lengths]
    data, tables = _tables(format, counts, device)
    ids = tables[tables >= 0].long()
    numbers = torch.cat(
        [torch.arange(count, device=device) for row in counts for count in row]
    )  # of each page within its head, in the order of `ids`
    for field in format.fields:
        shape = len(ids), field.rows_in(PAGE_SIZE), field.width
        if field.name == "position":
            at = torch.arange(PAGE_SIZE, device=device) + numbers[:, None] * PAGE_SIZE
            values = at[..., None].int()
        else:
            values = torch.randn(shape, device=device).to(field.dtype)
        format.view(data, field.name)[ids] = values
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    return PagedKV(data, format, tables.clamp_min(0), held)


def encoded_pages(
    codec: Codec, counts: Sequence[Sequence[int]], dim: int, dtype: torch.dtype, device: str
) -> PagedKV:
    """`counts[row][head]` full pages of random codes, scales and corrections, in random order."""
    columns = codec.columns(PAGE_SIZE, dim, dim, dtype)
    format = PageFormat(PAGE_SIZE, tuple(Field(c.name, c.dtype, c.width, c.rows) for c in columns))
    data, tables = _tables(format, counts, device)
    ids = tables[tables >= 0].long()
    bits = getattr(codec, "bits", 8)
    for field in format.fields:
        shape = len(ids), field.rows_in(PAGE_SIZE), field.width
        what = field.name[2:]
        if what == "codes":
            values = torch.randint(0, 256, shape, device=device)
        elif what == "mask":
            kept = format.field("k_kept").width
            values = torch.rand(shape, device=device).argsort(-1) < kept
        elif what == "places":
            values = torch.randint(0, PAGE_SIZE * dim, shape, device=device)
        elif what == "scale":
            values = torch.rand(shape, device=device) * 4 / 2**bits
        else:
            values = torch.randn(shape, device=device)
        format.view(data, field.name)[ids] = values.to(field.dtype)
    lengths = torch.tensor(counts, dtype=torch.int32, device=device) * PAGE_SIZE
    return PagedKV(data, format, tables.clamp_min(0), lengths)


def _tables(
    format: PageFormat, counts: Sequence[Sequence[int]], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """An arena without contents, and page tables, int32 [n, heads, most], -1 where there is no
    page."""
    held = torch.tensor(counts, device=device)
    total = int(held.sum())
    data = torch.zeros(max(1, total) * format.page_bytes, dtype=torch.uint8, device=device)
    exists = torch.arange(max(1, int(held.max())), device=device) < held[..., None]
    tables = torch.full(exists.shape, -1, dtype=torch.int32, device=device)
    ids = torch.randperm(total, device=device) * (format.page_bytes // 64)
    tables[exists] = ids.int()
    return data, tables
