"""Exact combination of attentions over disjoint sets of tokens, by their log-sum-exps."""

from __future__ import annotations

import torch


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of tokens, from the attention over each.

    lse = log(exp(lse_a) + exp(lse_b)), out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b.

    Args:
        out_a: attention over the first set, [..., v_dim], any floating dtype.
        lse_a: its log-sum-exp, natural logarithm, [...], fp32; -inf where the set is empty.
        out_b: attention over the second set, like `out_a`.
        lse_b: its log-sum-exp, like `lse_a`.

    Returns:
        `(out, lse)`: out like `out_a` in its dtype, lse fp32. Where both sets are empty, out is
        zero and lse is -inf; what an empty side holds in its out does not matter.

    Raises:
        ValueError: the shapes do not fit together.

    Example:
        >>> import torch
        >>> from tamis.attention import merge_states
        >>> out, lse = torch.randn(2, 3, 8), torch.randn(2, 3)
        >>> nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
        >>> torch.equal(merge_states(out, lse, *nothing)[0], out)
        True
    """
    if out_a.shape != out_b.shape or not out_a.shape[:-1] == lse_a.shape == lse_b.shape:
        raise ValueError(
            "merge_states needs out [..., v_dim] and lse [...] of one shape on both sides, got "
            f"out {tuple(out_a.shape)} and {tuple(out_b.shape)}, "
            f"lse {tuple(lse_a.shape)} and {tuple(lse_b.shape)}"
        )
    lse = _log_sum(lse_a, lse_b)
    return _weighted(out_a, lse_a, lse).add_(_weighted(out_b, lse_b, lse)).to(out_a.dtype), lse


def merge_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention after one more logit per head has joined the softmax's denominator only.

    Args:
        out: [tokens, q_heads, v_dim].
        lse: [tokens, q_heads], fp32.
        sinks: the logits, [q_heads].

    Returns:
        `(out, lse)` like the arguments.
    """
    total = _log_sum(lse, sinks.to(lse.dtype))
    return _weighted(out, lse, total).to(out.dtype), total


def _log_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log(exp(a) + exp(b)), elementwise.

    Not by torch.logaddexp, whose bits depend on where in a tensor an element lies, and a request's
    must not depend on who else is in its batch.
    """
    top = torch.maximum(a, b)
    origin = top.masked_fill(top == -torch.inf, 0.0)
    return origin + torch.log(torch.exp(a - origin) + torch.exp(b - origin))


def _weighted(out: torch.Tensor, lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """exp(lse - total) out in fp32, exactly zero where lse is -inf."""
    weight = torch.exp(lse - total).masked_fill(lse == -torch.inf, 0.0)[..., None]
    return torch.where(weight == 0, 0.0, out.float() * weight)
