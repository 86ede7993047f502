"""Attention of one sequence's chunk of tokens over its cached pages and, if asked, itself."""

from __future__ import annotations

from functools import partial

import torch

from tamis.attention import native, reference
from tamis.attention.checks import DTYPES, check_options, check_paged, check_pattern
from tamis.attention.pattern import SparsePattern
from tamis.cache.format import PagedKV
from tamis.platform import native_for, triton_for


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: PagedKV | None,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    pattern: SparsePattern | None = None,
    own: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a chunk of one sequence over what preceded it and, if `own`, over itself.

    out = softmax(softcap tanh(scale q K^T / softcap)) V over the visible tokens, where query head
    `h` reads KV head `h // (q_heads // kv_heads)`; without `softcap` the scores are scale q K^T.
    Softmax and sums are in fp32, but for bf16 the weights may be rounded to bf16 before they meet
    the values. Memory is bounded by tiles of queries and keys.

    Args:
        q: the chunk's queries, [tokens, q_heads, k_dim], fp32, fp16 or bf16.
        k: the chunk's keys, [tokens, kv_heads, k_dim], q's dtype. Without `own` they are not read
            and may also be [0, kv_heads, k_dim].
        v: the chunk's values, [tokens or 0 like k, kv_heads, v_dim], q's dtype.
        past: one row of pages with what precedes the chunk, per head as long as it may be; None
            for nothing. All of it is visible but for the window.
        scale: factor of the products of queries and keys, positive.
        positions: absolute positions of the chunk's tokens, ascending, int32 or int64 [tokens].
        window: a query at position `p` sees positions p - window + 1 and later; None for all.
        softcap: bound of the scores; None for no bound.
        sinks: one logit per query head that joins the softmax's denominator only, [q_heads].
        pattern: which of the visible (query, key) pairs are computed; None for all.
        own: whether the queries also see the chunk, causally. Without it they see `past` only: one
            part of an attention that `merge_states` completes.
        backend: a name of `tamis.platform.BACKENDS`; None chooses.

    Returns:
        `(out, lse)`: out [tokens, q_heads, v_dim] in q's dtype; lse [tokens, q_heads], fp32, the
        natural logarithm of the softmax's denominator, sinks included. A query that sees nothing
        has out zero and lse -inf (or its sink).

    Raises:
        ValueError: shapes or dtypes do not fit together, `scale` is not positive, or `pattern` is
            given without `own`.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import prefill
        >>> q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        >>> out, lse = prefill(q, k, v, None, scale=8**-0.5, positions=torch.arange(3))
        >>> torch.allclose(out[0, :2], v[0, :1])  # the first token sees only itself
        True
    """
    _check(q, k, v, past, own)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    check_options(q, positions, window, softcap, sinks)
    check_pattern(q, pattern)
    if pattern is not None and not own:
        raise ValueError("a pattern lists keys of the chunk too, so own must be True with one")
    operands = (q, k, v) if past is None else (q, k, v, past.data)
    run = reference.prefill
    if triton_for(backend, *operands):
        from tamis.attention.gpu.prefill import prefill as run  # takes seconds to import
    elif (extension := native_for(backend, *operands)) is not None:
        run = partial(native.prefill, extension)
    return run(
        q,
        k,
        v,
        past,
        scale=scale,
        positions=positions,
        window=window,
        softcap=softcap,
        sinks=sinks,
        pattern=pattern,
        own=own,
    )


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: PagedKV | None, own: bool
) -> None:
    """Raise ValueError unless the chunk's tensors fit together and fit `past`."""
    if (
        q.dim() != 3
        or k.dim() != 3
        or k.shape[2] != q.shape[2]
        or (k.shape[0] != q.shape[0] and (own or k.shape[0] != 0))
        or v.dim() != 3
        or v.shape[:2] != k.shape[:2]
        or q.shape[1] % k.shape[1]
        or not q.dtype == k.dtype == v.dtype
        or q.dtype not in DTYPES
    ):
        raise ValueError(
            "prefill needs q [tokens, q_heads, k_dim], k [tokens, kv_heads, k_dim] and "
            "v [tokens, kv_heads, v_dim] of one dtype of float32, float16, bfloat16, "
            "q_heads a multiple of kv_heads (and with own=False perhaps no tokens of k and v); got "
            f"q {q.dtype} {list(q.shape)}, k {k.dtype} {list(k.shape)}, v {v.dtype} {list(v.shape)}"
        )
    if past is not None:
        check_paged(q, past)
        if past.lengths.shape != (1, k.shape[1]) or past.format.field("v").width != v.shape[2]:
            raise ValueError(
                f"past must be one row of {k.shape[1]} KV heads with values of {v.shape[2]}, got "
                f"{list(past.lengths.shape)} and {past.format.field('v').width}"
            )
