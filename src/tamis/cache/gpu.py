"""Moves of tokens in Triton: for CUDA, and for Triton's interpreter.

Only `append` is here, which every layer of every step calls. What moves tokens or pages within the
arena (`PagePool.copy`, `move_tokens`, `gather`, `scatter`) indexes the device's tensors: a launch
that gathers and one that scatters per field, each bound by memory, to which the host sends the
indices, because page tables are its own.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tamis.cache.format import UNIT, PageFormat

TOKENS = 16
"""New tokens of one program."""


def append(
    data: torch.Tensor,
    format: PageFormat,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """`tamis.cache.moves.append`, whose docstring holds: one launch, and nothing that the host
    waits for."""
    n, kv_heads = lengths.shape
    tokens = len(positions)
    if not tokens:
        return
    k, v = (new if new.stride(2) == 1 else new.contiguous() for new in (k, v))
    dims, offsets = (k.shape[2], v.shape[2]), format.offsets
    _append[(-(-tokens // TOKENS), kv_heads)](
        data.view(k.dtype),
        data.view(v.dtype),
        data.view(torch.int32),
        tables,
        lengths,
        starts.contiguous(),
        k,
        v,
        positions.contiguous(),
        tables.stride(0),
        tables.stride(1),
        lengths.stride(0),
        lengths.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        n,
        ROWS=_power(n),
        TOKENS=TOKENS,
        PAGE=format.page_size,
        K_UNIT=UNIT // k.element_size(),
        V_UNIT=UNIT // v.element_size(),
        AT_UNIT=UNIT // 4,
        K_OFFSET=offsets["k"] // k.element_size(),
        V_OFFSET=offsets["v"] // v.element_size(),
        AT_OFFSET=offsets["position"] // 4,
        K_DIM=dims[0],
        K_PADDED=_power(dims[0]),
        V_DIM=dims[1],
        V_PADDED=_power(dims[1]),
    )


def _power(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


@triton.jit
def _append(
    k_data,
    v_data,
    at_data,
    tables,
    lengths,
    starts,
    k,
    v,
    positions,
    tables_row,
    tables_head,
    lengths_row,
    lengths_head,
    k_token,
    k_head,
    v_token,
    v_head,
    n,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    K_UNIT: tl.constexpr,
    V_UNIT: tl.constexpr,
    AT_UNIT: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    AT_OFFSET: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    """Some new tokens of one head: each finds its row, its page and its place there."""
    new = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    real = new < tl.load(starts + n)
    end = tl.arange(0, ROWS)
    ends = tl.load(starts + 1 + end, mask=end < n, other=2147483647)
    row = tl.sum((ends[None, :] <= new[:, None]).to(tl.int32), 1)
    token = tl.load(lengths + row * lengths_row + head * lengths_head, mask=real, other=0)
    token += (new - tl.load(starts + row, mask=real, other=0)).to(tl.int32)
    table = tables + row * tables_row + head * tables_head
    page = tl.load(table + token // PAGE, mask=real, other=0).to(tl.int64)
    slot = token % PAGE

    channel = tl.arange(0, K_PADDED)
    mask = real[:, None] & (channel < K_DIM)[None, :]
    rows = tl.load(k + (new * k_token + head * k_head)[:, None] + channel[None, :], mask=mask)
    at = page * K_UNIT + K_OFFSET + slot * K_DIM
    tl.store(k_data + at[:, None] + channel[None, :], rows, mask=mask)

    channel = tl.arange(0, V_PADDED)
    mask = real[:, None] & (channel < V_DIM)[None, :]
    rows = tl.load(v + (new * v_token + head * v_head)[:, None] + channel[None, :], mask=mask)
    at = page * V_UNIT + V_OFFSET + slot * V_DIM
    tl.store(v_data + at[:, None] + channel[None, :], rows, mask=mask)

    at = tl.load(positions + new, mask=real, other=0)
    tl.store(at_data + page * AT_UNIT + AT_OFFSET + slot, at, mask=real)
