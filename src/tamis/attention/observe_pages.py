"""The pages of one query per sequence that could match it best (see `observe`)."""

from __future__ import annotations

import torch

from tamis.attention.observe_backend import implementation
from tamis.cache.format import PagedKV


def top_pages(
    q: torch.Tensor,
    kv: PagedKV,
    count: int,
    *,
    low: str,
    high: str,
    before: PagedKV | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The pages whose keys could match a query best (Quest, algorithm 1), the last one always.

    A page's bound is the largest product that any query head of its KV head's group can have with
    a key between the page's smallest and largest elements: `bound_scores`. The last page holds the
    newest tokens, may be partly filled, and is always among the `count`.

    Args:
        q: queries, [n, q_heads, k_dim], fp32, fp16 or bf16.
        kv: the pages; row `i` of `q` looks at row `i` of `kv`.
        count: pages of each head, at least 1.
        low, high: fields of one row per page, of q's dtype, that hold the smallest and the largest
            element of the page's keys in each channel; read of all pages but the last.
        before: pages that come before those of `kv`, all of them full; they may have another
            format. None for none.
        backend: a name of `tamis.platform.BACKENDS`; None chooses.

    Returns:
        Numbers of pages, `before`'s first, ascending, int64 [n, kv_heads, count]; of equal bounds
        the first. What a head with fewer pages has beyond its own are numbers after its last.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a format lacks the fields.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> from tamis.cache.format import Field, PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> bounds = (Field("least", torch.float32, 8, 1), Field("most", torch.float32, 8, 1))
        >>> format = format.extended(bounds)
        >>> data = torch.zeros(3 * format.page_bytes, dtype=torch.uint8)
        >>> tables = (torch.arange(3) * (format.page_bytes // 64)).int()[None, None]
        >>> format.view(data, "most")[tables[0, 0, 1]] = 1  # the second page has larger keys
        >>> kv = PagedKV(data, format, tables, torch.full((1, 1), 9, dtype=torch.int32))
        >>> observe.top_pages(torch.ones(1, 2, 8), kv, 2, low="least", high="most")
        tensor([[[1, 2]]])
    """
    for pages in (kv, before):
        if pages is not None:
            _check(q, pages, low, high)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    run = implementation("top_pages", backend, q, kv)
    return run(q, kv, count, low=low, high=high, before=before)


def _check(q: torch.Tensor, pages: PagedKV, low: str, high: str) -> None:
    """Raise ValueError unless queries `q` can meet the bounds in the pages."""
    lengths, tables = pages.lengths, pages.tables
    if (
        q.dim() != 3
        or lengths.dim() != 2
        or tables.shape[:2] != lengths.shape
        or q.shape[0] != lengths.shape[0]
        or q.shape[1] % lengths.shape[1]
    ):
        raise ValueError(
            "top_pages needs q [n, q_heads, k_dim], tables [n, kv_heads, max_pages] and lengths "
            "[n, kv_heads], q_heads a multiple of kv_heads; got "
            f"{list(q.shape)}, {list(tables.shape)} and {list(lengths.shape)}"
        )
    if lengths.dtype != torch.int32 or tables.dtype != torch.int32:
        raise ValueError(
            f"tables and lengths must be torch.int32, got {tables.dtype} and {lengths.dtype}"
        )
    format = pages.format
    for name in (low, high):
        field = format.field(name) if name in format.offsets else None
        if field is None or (field.dtype, field.width, field.rows) != (q.dtype, q.shape[2], 1):
            raise ValueError(
                f"{name!r} must be a field of one row of {q.shape[2]} {q.dtype} per page; the "
                f"pages have {format.fields}"
            )
