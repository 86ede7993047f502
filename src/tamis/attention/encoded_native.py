"""Attention over encoded pages by the compiled extension."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tamis.attention.encoding import Encoding, PageEncoding, Pruned, Quantized
from tamis.attention.sides import side_layout
from tamis.cache.format import PagedKV, PageFormat
from tamis.platform import NATIVE_DTYPES


def decode(
    extension: ModuleType,
    q: Tensor,
    kv: PagedKV,
    encoding: PageEncoding,
    *,
    scale: float,
    softcap: float | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`tamis.attention.encoded.decode_encoded`, whose docstring holds, for tensors on the CPU.

    `extension` and `isa` as in `tamis.attention.native.decode`. The result depends neither on the
    number of threads nor on the rest of the batch.
    """
    n, q_heads, _ = q.shape
    tables, lengths = kv.tables, kv.lengths
    k, v, page_bytes = _layout(kv.format, encoding)
    out = q.new_empty(n, q_heads, v.dim, dtype=torch.float32)
    lse = q.new_empty(n, q_heads, dtype=torch.float32)
    q = q if q.stride(2) == 1 else q.contiguous()
    extension.decode_encoded(
        isa=isa or "",
        threads=torch.get_num_threads(),
        dtype=NATIVE_DTYPES[q.dtype],
        n=n,
        q_heads=q_heads,
        kv_heads=lengths.shape[1],
        q=q.data_ptr(),
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        data=kv.data.data_ptr(),
        page_size=kv.format.page_size,
        page_bytes=page_bytes,
        k=k,
        v=v,
        tables=tables.data_ptr(),
        tables_row_stride=tables.stride(0),
        tables_head_stride=tables.stride(1),
        lengths=lengths.data_ptr(),
        lengths_row_stride=lengths.stride(0),
        lengths_head_stride=lengths.stride(1),
        scale=scale,
        softcap=softcap or 0.0,
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    return out, lse


class _Side(NamedTuple):
    """`Side` of native/encoded.h, in its order."""

    rows: int
    dtype: int
    dim: int
    elements: int
    bits: int = 1
    group: int = 1
    scale: int = 0
    zero: int = 0
    kept: int = 0
    mask: int = 0
    rank: int = 0
    left: int = 0
    right: int = 0
    outliers: int = 0
    places: int = 0
    added: int = 0
    wide_places: int = 0


@lru_cache(maxsize=256)
def _layout(format: PageFormat, encoding: PageEncoding) -> tuple[_Side, _Side, int]:
    """Where the kernel finds keys and values, and bytes from a page's start that it reads."""
    read = [format.field(name) for name in encoding.fields]
    end = max(format.offsets[f.name] + f.rows_in(format.page_size) * f.row_bytes for f in read)
    return _side(format, "k", encoding.k), _side(format, "v", encoding.v), end


def _side(format: PageFormat, name: str, encoding: Encoding) -> _Side:
    of = side_layout(format, name, encoding)
    side = _Side(
        rows=0,
        dtype=NATIVE_DTYPES[of.floats],
        dim=of.dim,
        elements=of.elements,
        scale=of.scale,
        zero=of.zero,
        kept=of.kept,
        mask=of.mask,
        rank=of.rank,
        left=of.left,
        right=of.right,
        outliers=of.outliers,
        places=of.places,
        added=of.added,
        wide_places=int(of.numbers == torch.int32),
    )
    if isinstance(of.rows, Quantized):
        code = 1 if of.rows.along == "tokens" else 2
        return side._replace(rows=code, bits=of.rows.bits, group=of.rows.group)
    return side._replace(rows=3) if isinstance(of.rows, Pruned) else side
