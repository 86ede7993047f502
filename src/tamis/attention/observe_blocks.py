"""Summaries of pages and blocks of tokens, and what a query may find in them; plain torch."""

from __future__ import annotations

import torch


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value of each channel over the keys of each page (Quest, 3.2).

    Args:
        k: keys of full pages, [pages, page_size, k_dim], any floating dtype.

    Returns:
        `(k_min, k_max)`, [pages, k_dim] each, fp32.

    Raises:
        ValueError: `k` has another number of dimensions, or pages of no token.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> observe.page_bounds(torch.tensor([[[1.0, -2.0], [3.0, -4.0]]]))
        (tensor([[ 1., -4.]]), tensor([[ 3., -2.]]))
    """
    if k.dim() != 3 or k.shape[1] == 0:
        raise ValueError(
            f"k must be [pages, page_size, k_dim], page_size >= 1, got {list(k.shape)}"
        )
    k_min, k_max = k.aminmax(dim=1)
    return k_min.float(), k_max.float()


def bound_scores(q: torch.Tensor, k_min: torch.Tensor, k_max: torch.Tensor) -> torch.Tensor:
    """Upper bound of the products of a query with the keys of each page (Quest, algorithm 1).

    sum over c of max(q_c min_c, q_c max_c) = relu(q) k_max^T + min(q, 0) k_min^T, so two matrix
    products compute it.

    Args:
        q: one token's queries, [q_heads, k_dim], any floating dtype.
        k_min: smallest values per page, [kv_heads, pages, k_dim], fp32 as `page_bounds` returns.
        k_max: largest values per page, like `k_min`.

    Returns:
        [q_heads, pages], fp32; multiply by the attention's (positive) scale for bounds of scores.

    Raises:
        ValueError: shapes do not fit together.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> k_min, k_max = torch.tensor([[[1.0, -4.0]]]), torch.tensor([[[3.0, -2.0]]])
        >>> observe.bound_scores(torch.tensor([[1.0, -1.0]]), k_min, k_max)
        tensor([[7.]])
    """
    if (
        q.dim() != 2
        or k_min.dim() != 3
        or k_min.shape != k_max.shape
        or k_min.shape[2] != q.shape[1]
        or q.shape[0] % k_min.shape[0]
    ):
        raise ValueError(
            "bound_scores needs q [q_heads, k_dim], k_min and k_max [kv_heads, pages, k_dim], "
            "q_heads a multiple of kv_heads; got "
            f"{list(q.shape)}, {list(k_min.shape)}, {list(k_max.shape)}"
        )
    kv_heads, _, k_dim = k_min.shape
    grouped = q.float().reshape(kv_heads, q.shape[0] // kv_heads, k_dim)
    above = grouped.clamp_min(0) @ k_max.float().transpose(1, 2)
    return above.baddbmm_(grouped.clamp_max(0), k_min.float().transpose(1, 2)).flatten(0, 1)


def pooled(x: torch.Tensor, block: int) -> torch.Tensor:
    """Means over blocks of consecutive tokens, as block-sparse prefill estimates attention from.

    Args:
        x: queries or keys, [tokens, heads, dim], any floating dtype.
        block: tokens per block; the last block is the mean of what is left.

    Returns:
        [heads, blocks, dim], fp32, contiguous.

    Raises:
        ValueError: `x` has another number of dimensions, or `block` is less than 1.

    Example:
        >>> import torch
        >>> from tamis.attention import observe
        >>> observe.pooled(torch.tensor([0.0, 2.0, 8.0]).reshape(3, 1, 1), block=2)
        tensor([[[1.],
                 [8.]]])
    """
    if x.dim() != 3 or block < 1:
        raise ValueError(
            f"pooled needs x [tokens, heads, dim] and block >= 1, got {list(x.shape)} and {block}"
        )
    whole = len(x) // block * block
    means = x[:whole].reshape(len(x) // block, block, *x.shape[1:]).mean(1, dtype=torch.float32)
    if whole < len(x):
        means = torch.cat([means, x[whole:].mean(0, keepdim=True, dtype=torch.float32)])
    return means.transpose(0, 1).contiguous()
