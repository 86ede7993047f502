"""Attention of one query token per sequence over encoded pages, as they are."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tamis.attention import encoded_native, encoded_reference
from tamis.attention.checks import check_encoded
from tamis.attention.encoding import PageEncoding
from tamis.cache.format import PagedKV
from tamis.platform import native_for, triton_for


def decode_encoded(
    q: Tensor,
    kv: PagedKV,
    encoding: PageEncoding,
    *,
    scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence over that sequence's encoded pages, all tokens visible.

    `tamis.attention.decode` with the K and V that `encoding.restore` gives; they are never formed:
    scales meet the query or the softmax weights, `q (left right) = (q right^T) left^T`, and
    channels that were pruned are not read.

    Args:
        q: queries, [n, q_heads, k_dim], fp32, fp16 or bf16; the dtype of keys that are stored as
            they are or pruned.
        kv: the pages; row `i` of `q` reads row `i` of `kv`. Heads may differ in length and be
            empty; lengths are of whole pages. To read some of a head's pages, name only them.
        encoding: what the pages' fields mean.
        scale: factor of the products of queries and keys.
        softcap: bound of the scores; None for no bound.
        backend: a name of `tamis.platform.BACKENDS`; None chooses.

    Returns:
        `(out, lse)`: out [n, q_heads, v_dim], fp32; lse [n, q_heads], fp32, as of `decode`: to be
        merged with the attention over other pages by `merge_states`.

    Raises:
        ValueError: shapes, dtypes, fields or lengths do not fit together.
        ConfigError: `backend` is unknown or cannot run here.

    Example:
        >>> import torch
        >>> from tamis.attention.encoded import decode_encoded
        >>> from tamis.attention.encoding import Encoding, PageEncoding, Plain, Quantized
        >>> from tamis.cache.format import Field, PagedKV, PageFormat
        >>> half = torch.float16
        >>> keys = [Field("k_codes", torch.uint8, 4), Field("k_scale", half, 16, rows=1)]
        >>> keys += [Field("k_zero", half, 16, rows=1)]
        >>> format = PageFormat(32, (*keys, Field("v", half, 16)))
        >>> data = torch.zeros(format.page_bytes, dtype=torch.uint8)
        >>> tables = torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> kv = PagedKV(data, format, tables, torch.tensor([[32]], dtype=torch.int32))
        >>> encoding = PageEncoding(Encoding(Quantized(2, 32, "tokens")), Encoding(Plain()))
        >>> out, lse = decode_encoded(torch.randn(1, 4, 16), kv, encoding, scale=1.0)
        >>> out.shape, lse.exp().round().tolist()
        (torch.Size([1, 4, 16]), [[32.0, 32.0, 32.0, 32.0]])
    """
    check_encoded(q, kv, encoding, softcap)
    run = encoded_reference.decode
    if triton_for(backend, q, kv.data):
        from tamis.attention.gpu.encoded import decode as run  # takes seconds to import
    elif (extension := native_for(backend, q, kv.data)) is not None:
        run = partial(encoded_native.decode, extension)
    return run(q, kv, encoding, scale=scale, softcap=softcap)
