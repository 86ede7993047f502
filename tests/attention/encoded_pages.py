"""Random encoded pages of any encoding, and what attention over them is by its definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tamis.attention import encoded_native, encoded_reference
from tamis.attention.encoded import decode_encoded
from tamis.attention.encoding import (
    Encoding,
    PageEncoding,
    Pruned,
    Quantized,
    pack,
    packed_bytes,
    restore,
)
from tamis.cache.format import Field, PagedKV, PageFormat
from tamis.platform import native_module, triton_installed
from tests.attention import naive

RANK, OUTLIERS = 3, 7

BACKENDS = [*naive.BACKENDS, *(["triton"] if triton_installed() else [])]
"""`naive.BACKENDS` and Triton, interpreted unless there is a GPU (see tests/conftest.py)."""


def implementation(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Decode over encoded pages by one of BACKENDS."""
    if backend == "reference":
        return encoded_reference.decode
    if backend == "triton":
        return partial(decode_encoded, backend="triton")
    return partial(encoded_native.decode, native_module(), isa=backend)


def page_format(
    encoding: PageEncoding, page_size: int, k_dim: int, v_dim: int, dtype: torch.dtype
) -> PageFormat:
    """Pages of `encoding` with rows in `dtype`, scales and corrections in 16 bits, and a field that
    attention does not read."""
    fields: list[Field] = []
    for name, side, dim in (("k", encoding.k, k_dim), ("v", encoding.v, v_dim)):
        fields += _fields(name, side, page_size, dim, dtype)
    return PageFormat(page_size, (*fields, Field("k_unread", torch.float32, 3, rows=1)))


def _fields(name: str, side: Encoding, page_size: int, dim: int, dtype: torch.dtype) -> list[Field]:
    rows = side.rows
    half = torch.float16 if dtype == torch.float32 else dtype
    if isinstance(rows, Quantized):
        fields = [Field(f"{name}_codes", torch.uint8, packed_bytes(dim, rows.bits))]
        for what in ("scale", "zero"):
            if rows.along == "tokens":
                fields.append(Field(f"{name}_{what}", half, dim, rows=page_size // rows.group))
            else:
                fields.append(Field(f"{name}_{what}", half, dim // rows.group))
    else:
        half = dtype
        fields = [Field(name, dtype, dim)]
        if isinstance(rows, Pruned):
            fields = [Field(f"{name}_kept", dtype, max(1, dim * 3 // 5))]
            fields.append(Field(f"{name}_mask", torch.uint8, dim, rows=1))
    if side.low_rank:
        fields.append(Field(f"{name}_left", half, RANK))
        fields.append(Field(f"{name}_right", half, dim, rows=RANK))
    if side.outliers:
        wide = torch.int16 if page_size * dim <= 2**15 else torch.int32
        fields.append(Field(f"{name}_places", wide, OUTLIERS, rows=1))
        fields.append(Field(f"{name}_outliers", half, OUTLIERS, rows=1))
    return fields


def pages(
    encoding: PageEncoding, format: PageFormat, k_dim: int, v_dim: int, counts: Sequence[list[int]]
) -> PagedKV:
    """`counts[row][head]` random pages per head, in random order; all other memory is NaN, and
    spare table entries point outside of the arena."""
    total = sum(map(sum, counts))
    data = torch.full(((total + 1) * format.page_bytes,), 0xFF, dtype=torch.uint8)
    ids = torch.randperm(total) * (format.page_bytes // 64)
    for field in format.fields:
        if field.name in encoding.fields:
            side, dim = (encoding.k, k_dim) if field.name[0] == "k" else (encoding.v, v_dim)
            format.view(data, field.name)[ids] = _random(field, side, format, dim, total)
    free = ids.tolist()
    widest = max(max(row) for row in counts) + 1
    tables = torch.full((len(counts), len(counts[0]), widest), 2**31 - 1, dtype=torch.int32)
    for row, heads in enumerate(counts):
        for head, count in enumerate(heads):
            held = [free.pop() for _ in range(count)]
            tables[row, head, :count] = torch.tensor(held, dtype=torch.int32)
    lengths = torch.tensor(counts, dtype=torch.int32) * format.page_size
    return PagedKV(data, format, tables, lengths)


def _random(field: Field, side: Encoding, format: PageFormat, dim: int, total: int) -> Tensor:
    shape = total, field.rows_in(format.page_size), field.width
    what = field.name[2:]
    if what == "codes":
        assert isinstance(side.rows, Quantized)
        codes = torch.randint(0, 2**side.rows.bits, (total, format.page_size, dim))
        return pack(codes.to(torch.uint8), side.rows.bits)
    if what == "mask":
        kept = max(1, dim * 3 // 5)
        return (torch.rand(total, 1, dim).argsort(-1) < kept).to(torch.uint8)
    if what == "places":
        chosen = torch.rand(total, 1, format.page_size * dim).argsort(-1)
        return chosen[..., : field.width].to(field.dtype)
    if what == "scale":
        assert isinstance(side.rows, Quantized)
        return torch.rand(shape).mul(4 / 2**side.rows.bits).to(field.dtype)
    return torch.randn(shape).to(field.dtype)


def definition(
    q: Tensor, kv: PagedKV, encoding: PageEncoding, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the pages restored, in fp64, one query head at a time."""
    group = q.shape[1] // kv.lengths.shape[1]
    outs, lses = [], []
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            held = int(kv.lengths[row, head // group]) // kv.format.page_size
            ids = kv.tables[row, head // group, :held].long()
            fields = {name: kv.format.view(kv.data, name)[ids] for name in encoding.fields}
            k, v = (x.flatten(0, 1) for x in restore(fields, encoding))
            out, lse = naive.attend(q[row, head], k, v, scale=scale, softcap=softcap)
            outs.append(out)
            lses.append(lse)
    return torch.stack(outs).view(*q.shape[:2], -1), torch.tensor(lses).double().view(q.shape[:2])
