"""What the Triton kernels share: loads of tokens from pages, scores, the running softmax.

Pages are addressed in elements of their dtype: a page id counts `unit` elements, and a field
begins `offset` elements into the page.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tamis.cache.format import UNIT, PagedKV

MIN_DOT = 16
"""The least extent of a matrix product on tensor cores."""

WIDE_DOT = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether products take fp32 operands: Triton's interpreter multiplies bf16 as integers."""


def padded(n: int) -> int:
    """The extent of a tile that holds `n` rows or channels: a power of two."""
    return max(MIN_DOT, 1 << (n - 1).bit_length())


def tile_bytes(device: torch.device) -> int:
    """Bytes of a tile of keys and values, of which a multiprocessor's shared memory holds several:
    100 KB on small GPUs, 164 KB and more on those of data centres."""
    if device.type != "cuda":
        return 1 << 15
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the attribute
    return 1 << 15 if properties.shared_memory_per_block_optin > 1 << 17 else 1 << 14


def tile_rows(most: int, row_bytes: int, n_bytes: int) -> int:
    """Rows of a tile that take at most `n_bytes`: a power of two, MIN_DOT to `most`."""
    rows = most
    while rows > MIN_DOT and rows * row_bytes > n_bytes:
        rows //= 2
    return rows


def page_fields(kv: PagedKV, dtype: torch.dtype) -> dict[str, object]:
    """A PagedKV's arguments of the kernels, keys and values being of `dtype`."""
    format, item = kv.format, dtype.itemsize
    return {
        "data": kv.data.view(dtype),
        "at_data": kv.data.view(torch.int32),
        "tables": kv.tables,
        "lengths": kv.lengths,
        "tables_row": kv.tables.stride(0),
        "tables_head": kv.tables.stride(1),
        "lengths_row": kv.lengths.stride(0),
        "lengths_head": kv.lengths.stride(1),
        "UNIT": UNIT // item,
        "K_OFFSET": format.offsets["k"] // item,
        "V_OFFSET": format.offsets["v"] // item,
        "AT_OFFSET": format.offsets["position"] // 4,
        "PAGE": format.page_size,
    }


@triton.jit
def dot(a, b, PRECISION: tl.constexpr = "ieee"):
    """a @ b with fp32 sums; PRECISION is `tl.dot`'s, by default fp32 operands stay fp32."""
    if WIDE_DOT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def page_of(table, token, known, PAGE: tl.constexpr):
    """The page ids of tokens [n] of the head whose page table begins at `table`, int64."""
    return tl.load(table + token // PAGE, mask=known, other=0).to(tl.int64)


@triton.jit
def load_rows(data, page, slot, known, UNIT, OFFSET, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows [n, PADDED] of a field of DIM channels; zero where not `known` [n]."""
    channel = tl.arange(0, PADDED)
    at = page * UNIT + OFFSET + slot * DIM
    mask = known[:, None] & (channel < DIM)[None, :]
    return tl.load(data + at[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_positions(at_data, page, slot, known, ITEM: tl.constexpr, UNIT, OFFSET):
    """Absolute positions [n] of tokens; UNIT counts elements of ITEM bytes."""
    return tl.load(at_data + page * (UNIT * ITEM // 4) + OFFSET + slot, mask=known, other=0)


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(scores / softcap), where there is a bound."""
    if CAPPED:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return scores


@triton.jit
def absorb(top, total, acc, scores, v, PRECISION: tl.constexpr = "ieee"):
    """Take a tile into a running softmax.

    Args:
        top, total: largest score and sum of exponentials so far, [rows]; acc: [rows, v_dim].
        scores: fp32 [rows, n], -inf where unseen; v: [n, v_dim].
        PRECISION: of their product, as in `dot`.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(scores - origin[:, None])
    shrunk = tl.exp(top - origin)
    acc = acc * shrunk[:, None] + dot(weights.to(v.dtype), v, PRECISION)
    return new_top, total * shrunk + tl.sum(weights, 1), acc


@triton.jit
def finished(top, total, acc):
    """A running softmax's result: [rows, v_dim] and log-sum-exp [rows]; of nothing zero and
    -inf."""
    empty = total == 0  # a NaN is not nothing
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    return out, lse
