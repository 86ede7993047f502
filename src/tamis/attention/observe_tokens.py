"""What one query per sequence looks at among its cached tokens (see `observe`)."""

from __future__ import annotations

import torch

from tamis.attention import observe_native, observe_reference
from tamis.attention.observe_backend import check_rows, implementation, longest
from tamis.attention.observe_decode import over_channels
from tamis.cache.format import PagedKV
from tamis.platform import native_for


def token_weights(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    scale: float,
    softcap: float | None = None,
    channels: torch.Tensor | None = None,
    divisors: torch.Tensor | None = None,
    first: int = 0,
    last: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """The softmax of one query per sequence over some of its cached tokens.

    weights[h] = softmax over the tokens first .. length - last - 1 of score / divisors[h], where
    the score may be taken over some channels only, as in `partial_scores`. Sinks take no part.

    Args:
        q: queries, [n, q_heads, k_dim], fp32, fp16 or bf16, like K and V.
        kv: the pages; row `i` of `q` reads row `i` of `kv`.
        scale: factor of the products of queries and keys.
        softcap: bound of the scores; None for no bound.
        channels: the channels of each KV head, distinct, int64 [n, kv_heads, r]; None for all.
        divisors: of the scores (temperatures), positive, [n, q_heads]; None for 1.
        first, last: so many first and last tokens of each head have no weight.
        backend: a name of `tamis.platform.BACKENDS`; None chooses.

    Returns:
        [n, q_heads, max_len]; zero for tokens without weight. Each row sums to 1 where any has.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a channel does not exist.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> from tamis.cache.format import PagedKV, PageFormat
        >>> format = PageFormat.dense(page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
        >>> data = torch.zeros(format.page_bytes, dtype=torch.uint8)
        >>> tables = torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> kv = PagedKV(data, format, tables, torch.full((1, 1), 4, dtype=torch.int32))
        >>> observe.token_weights(torch.randn(1, 1, 8), kv, scale=1.0, first=1, last=1)
        tensor([[[0.0000, 0.5000, 0.5000, 0.0000]]])
    """
    check_rows(q, kv)
    if first < 0 or last < 0:
        raise ValueError(f"first and last must be at least 0, got {first} and {last}")
    if divisors is not None and divisors.shape != q.shape[:2]:
        raise ValueError(
            f"divisors must be {list(q.shape[:2])}, one per query head, got {list(divisors.shape)}"
        )
    if channels is not None:
        q = over_channels(q, kv, channels)
    scores = implementation("decode_scores", backend, q, kv)(
        q, kv, longest(kv), scale=scale, softcap=softcap
    )
    soften = implementation("softmax_tokens", backend, q, kv)
    return soften(scores, kv.lengths, divisors=divisors, first=first, last=last)


def top_tokens(
    values: torch.Tensor,
    lengths: torch.Tensor,
    count: int,
    *,
    first: int = 0,
    last: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """The tokens of largest value of each head, its first and last ones always.

    Args:
        values: fp32 [heads, tokens].
        lengths: tokens of each head, int64 [heads].
        count: tokens that are wanted, at least 1.
        first, last: how many first and last tokens are among them whatever their value; the first
            ones go before the last ones where `count` is too small for both.
        backend: "reference" or "native"; None chooses (see `tamis.platform.native_for`).

    Returns:
        Indices, ascending, int64 [heads, count]; of equal values the first. What a head with fewer
        tokens has beyond its own are indices after its last.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit together.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> observe.top_tokens(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([4]), 2, last=1)
        tensor([[0, 3]])
    """
    if values.dim() != 2 or values.dtype != torch.float32 or values.shape[:1] != lengths.shape:
        raise ValueError(
            "top_tokens needs float32 values [heads, tokens] and lengths [heads], got "
            f"{values.dtype} {list(values.shape)} and {list(lengths.shape)}"
        )
    if lengths.dtype != torch.int64 or bool((lengths > values.shape[1]).any()):
        raise ValueError(
            f"lengths must be torch.int64, at most {values.shape[1]}, "
            f"got {lengths.dtype} {lengths.tolist()}"
        )
    if count < 1 or first < 0 or last < 0:
        raise ValueError(
            f"count must be at least 1, first and last at least 0, got {count}, {first}, {last}"
        )
    extension = native_for(backend, values, lengths)
    if extension is None:
        return observe_reference.top_tokens(values, lengths, count, first, last)
    return observe_native.top_tokens(extension, values, lengths, count, first, last)
