"""Statistics of one query per sequence over its cached tokens (see `observe`)."""

from __future__ import annotations

import torch

from tamis.attention.checks import check_options
from tamis.attention.observe_backend import check_lse, check_rows, implementation, longest
from tamis.cache.format import PagedKV


def decode_weights(
    q: torch.Tensor,
    kv: PagedKV,
    lse: torch.Tensor,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The attention weights exp(score - lse) of one query per sequence.

    Args:
        q: queries, [n, q_heads, k_dim], fp32, fp16 or bf16, like K and V.
        kv: the pages; row `i` of `q` reads row `i` of `kv`.
        lse: as `tamis.attention.decode` returned it for these queries, [n, q_heads].
        scale: factor of the products of queries and keys.
        positions: absolute position of each query, int32 or int64 [n]; needed with `window`. None
            where every cached token is seen, as in `decode`.
        window: a query at position `p` sees positions p - window + 1 and later; None for all.
        softcap: bound of the scores; None for no bound.
        backend: "reference" or "native"; None chooses (see `tamis.platform.native_for`).

    Returns:
        [n, q_heads, max_len].

    Raises:
        ValueError: shapes or dtypes do not fit together.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import decode, observe
        >>> from tamis.cache.format import PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> data = torch.zeros(format.page_bytes, dtype=torch.uint8)
        >>> tables = torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> kv = PagedKV(data, format, tables, torch.full((1, 1), 4, dtype=torch.int32))
        >>> q = torch.randn(1, 2, 8)
        >>> _, lse = decode(q, kv, scale=1.0)
        >>> observe.decode_weights(q, kv, lse, scale=1.0)
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500],
                 [0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    check_rows(q, kv)
    check_options(q, positions, window, softcap, None)
    check_lse(q, lse)
    run = implementation("decode_weights", backend, q, kv)
    return run(
        q, kv, lse, longest(kv), scale=scale, positions=positions, window=window, softcap=softcap
    )


def partial_scores(
    q: torch.Tensor,
    kv: PagedKV,
    channels: torch.Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> torch.Tensor:
    """Scores of one query per sequence over some channels only: SparQ's approximate scores.

    scores[h, i] = scale sum over c in channels[kv head of h] of q[h, c] k[i, c]. Keys lie token by
    token in pages, where r of the channels touch the cache lines of all: the products are taken
    over whole keys with a query that is zero elsewhere, at no more traffic.

    Args:
        q: queries, [n, q_heads, k_dim], fp32, fp16 or bf16, like K and V.
        kv: the pages; row `i` of `q` reads row `i` of `kv`.
        channels: the channels of each KV head, distinct, int64 [n, kv_heads, r].
        scale: factor of the products.
        backend: "reference" or "native"; None chooses (see `tamis.platform.native_for`).

    Returns:
        [n, q_heads, max_len]; -inf beyond each head's length.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a channel does not exist.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> from tamis.cache.format import PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> data = torch.zeros(format.page_bytes, dtype=torch.uint8)
        >>> format.view(data, "k")[0] = 1
        >>> tables = torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> kv = PagedKV(data, format, tables, torch.full((1, 1), 3, dtype=torch.int32))
        >>> q = torch.arange(8.0).reshape(1, 1, 8)
        >>> observe.partial_scores(q, kv, torch.tensor([[[2, 7]]]), scale=1.0)
        tensor([[[9., 9., 9.]]])
    """
    check_rows(q, kv)
    q = over_channels(q, kv, channels)
    run = implementation("decode_scores", backend, q, kv)
    return run(q, kv, longest(kv), scale=scale, softcap=None)


def over_channels(q: torch.Tensor, kv: PagedKV, channels: torch.Tensor) -> torch.Tensor:
    """Queries that are zero but for some channels of each KV head, int64 [n, kv_heads, r].

    Raises:
        ValueError: `channels` has another shape or dtype, or one does not exist.
    """
    n, q_heads, k_dim = q.shape
    kv_heads = kv.lengths.shape[1]
    if channels.dtype != torch.int64 or channels.shape != (n, kv_heads, *channels.shape[2:3]):
        raise ValueError(
            f"channels must be int64 [{n}, {kv_heads}, r], "
            f"got {channels.dtype} {list(channels.shape)}"
        )
    if channels.numel() and not 0 <= int(channels.min()) <= int(channels.max()) < k_dim:
        raise ValueError(
            f"channels must be 0..{k_dim - 1}, got {int(channels.min())}..{int(channels.max())}"
        )
    others = torch.ones(n, kv_heads, 1, k_dim, dtype=torch.bool, device=q.device)
    others.scatter_(3, channels[:, :, None], False)
    grouped = q.reshape(n, kv_heads, q_heads // kv_heads, k_dim)
    return grouped.masked_fill(others, 0).view(n, q_heads, k_dim)
