"""Statistics of a chunk's queries over one sequence's cached tokens (see `observe`)."""

from __future__ import annotations

import math

import torch

from tamis.attention.checks import check_options
from tamis.attention.observe_backend import check_lse, check_row, implementation, longest
from tamis.cache.format import PagedKV


def window_weights(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The attention weights of a few queries over all cached tokens, as of an observation window.

    Memory is that of the result: SnapKV's window of 64 queries at 32k tokens and 8 heads is 67 MB.

    Args:
        q: queries, [w, q_heads, k_dim], fp32, fp16 or bf16, like K and V.
        kv: one row of pages, the queries' own tokens included.
        scale: factor of the products of queries and keys.
        positions: absolute positions of the queries, ascending, int32 or int64 [w].
        window: a query at position `p` sees positions p - window + 1 and later; None for all.
        softcap: bound of the scores; None for no bound.
        sinks: one logit per query head that joins the softmax's denominator only, [q_heads].
        backend: "reference" or "native"; None chooses (see `tamis.platform.native_for`).

    Returns:
        [q_heads, w, max_len]; each row sums to 1, less the weight of the sinks, or is zero where
        the query sees nothing.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> from tamis.cache.format import PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> data = torch.zeros(format.page_bytes, dtype=torch.uint8)
        >>> format.view(data, "position")[0, :, 0] = torch.arange(4)
        >>> tables = torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> kv = PagedKV(data, format, tables, torch.full((1, 1), 4, dtype=torch.int32))
        >>> q = torch.randn(2, 1, 8)  # keys are zero, so all visible tokens weigh the same
        >>> observe.window_weights(q, kv, scale=1.0, positions=torch.tensor([1, 3]))
        tensor([[[0.5000, 0.5000, 0.0000, 0.0000],
                 [0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    check_row(q, kv)
    check_options(q, positions, window, softcap, sinks)
    run = implementation("chunk_scores", backend, q, kv)
    scores = run(
        q, kv, longest(kv), scale=scale, positions=positions, window=window, softcap=softcap
    )
    return scores if scores.shape[2] == 0 else _softmax(scores, sinks)


def column_sums(
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor,
    *,
    scale: float,
    positions: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    decay: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """For every cached token, the sum of a chunk's attention weights on it.

    sums[h, i] = sum over queries t of decay^(last position - position of t) exp(score - lse[t, h]);
    H2O's accumulated attention without decay.

    Args:
        q: the chunk's queries, [tokens, q_heads, k_dim], fp32, fp16 or bf16, like K and V.
        kv: one row of pages, the chunk's own tokens included.
        lse: as `tamis.attention.prefill` returned it for these queries, [tokens, q_heads].
        scale: factor of the products of queries and keys.
        positions: absolute positions of the queries, ascending, int32 or int64 [tokens].
        window: a query at position `p` sees positions p - window + 1 and later; None for all.
        softcap: bound of the scores; None for no bound.
        decay: factor per position by which older queries count less, in (0, 1].
        backend: "reference" or "native"; None chooses (see `tamis.platform.native_for`).

    Returns:
        [q_heads, max_len].

    Raises:
        ValueError: shapes or dtypes do not fit together, or `decay` is not in (0, 1].
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import observe, prefill
        >>> from tamis.cache.format import PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> data = torch.zeros(format.page_bytes, dtype=torch.uint8)
        >>> format.view(data, "position")[0, :, 0] = torch.arange(4)
        >>> tables = torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> kv = PagedKV(data, format, tables, torch.full((1, 1), 2, dtype=torch.int32))
        >>> q, k, options = torch.randn(2, 1, 8), torch.zeros(2, 1, 8), {"scale": 1.0}
        >>> options["positions"] = torch.arange(2)
        >>> _, lse = prefill(q, k, k, None, **options)
        >>> observe.column_sums(q, kv, lse, **options)  # the first token is seen by both queries
        tensor([[1.5000, 0.5000]])
    """
    check_row(q, kv)
    check_options(q, positions, window, softcap, None)
    check_lse(q, lse)
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}; 1 weighs all queries the same")
    if decay != 1 and len(positions):
        # A factor of the weight is a summand of its exponent.
        lse = lse - math.log(decay) * (positions[-1] - positions)[:, None]
    run = implementation("column_sums", backend, q, kv)
    return run(
        q, kv, lse, longest(kv), scale=scale, positions=positions, window=window, softcap=softcap
    )


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over tokens, written over `scores` [q_heads, w, tokens]; zero where all are -inf."""
    # Where every score is -inf, any finite origin gives the weights 0 that are wanted.
    top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sinks.float()[:, None, None] - top)
    return weights.div_(total.masked_fill_(total == 0, 1))
