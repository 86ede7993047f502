"""Attention of one query token per sequence over its cached pages."""

from __future__ import annotations

from functools import partial

import torch

from tamis.attention import native, reference
from tamis.attention.checks import check_options, check_paged, check_tokens
from tamis.attention.pattern import TokenList
from tamis.cache.format import PagedKV
from tamis.platform import native_for, triton_for


def decode(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tokens: TokenList | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per sequence over that sequence's cached tokens.

    out = softmax(softcap tanh(scale q K^T / softcap)) V over the visible tokens of each head, where
    query head `h` reads KV head `h // (q_heads // kv_heads)`; without `softcap` the scores are
    scale q K^T. Softmax and sums are in fp32.

    Args:
        q: queries, [n, q_heads, k_dim], fp32, fp16 or bf16, like K and V.
        kv: the pages; row `i` of `q` reads row `i` of `kv`. Heads may differ in length and be
            empty.
        scale: factor of the products of queries and keys.
        positions: absolute position of each query, int32 or int64 [n]; needed with `window`.
        window: a query at position `p` sees cached positions p - window + 1 and later; None for
            all.
        softcap: bound of the scores; None for no bound.
        sinks: one logit per query head that joins the softmax's denominator only, [q_heads].
        tokens: the cached tokens that each head reads; None for all.
        backend: a name of `tamis.platform.BACKENDS`; None chooses.

    Returns:
        `(out, lse)`: out [n, q_heads, v_dim] in q's dtype; lse [n, q_heads], fp32, the natural
        logarithm of the softmax's denominator, sinks included. A head that sees no token has out
        zero and lse -inf (or its sink).

    Raises:
        ValueError: shapes or dtypes do not fit together.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import decode
        >>> from tamis.cache.format import PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=16, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> data = torch.zeros(2 * format.page_bytes, dtype=torch.uint8)
        >>> pages = torch.tensor([[[0], [format.page_bytes // 64]]], dtype=torch.int32)
        >>> lengths = torch.tensor([[5, 16]], dtype=torch.int32)  # one sequence, two KV heads
        >>> kv = PagedKV(data, format, pages, lengths)
        >>> out, lse = decode(torch.randn(1, 4, 8), kv, scale=1.0)
        >>> out.shape, lse.exp().round().tolist()
        (torch.Size([1, 4, 8]), [[5.0, 5.0, 16.0, 16.0]])
    """
    check_paged(q, kv)
    if q.shape[0] != kv.lengths.shape[0]:
        raise ValueError(f"{q.shape[0]} queries cannot read {kv.lengths.shape[0]} rows of pages")
    check_options(q, positions, window, softcap, sinks)
    check_tokens(kv, tokens)
    run = reference.decode
    if triton_for(backend, q, kv.data):
        from tamis.attention.gpu.decode import decode as run  # takes seconds to import
    elif (extension := native_for(backend, q, kv.data)) is not None:
        run = partial(native.decode, extension)
    return run(
        q,
        kv,
        scale=scale,
        positions=positions,
        window=window,
        softcap=softcap,
        sinks=sinks,
        tokens=tokens,
    )
