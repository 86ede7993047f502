"""SparQ Attention: a step finds its tokens with a few channels of the keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tamis.methods.base import Select, param
from tamis.methods.views import DecodeView, Needs, Selection, group_sum


@dataclass(frozen=True)
class SparQ(Select):
    """A decode step scores all tokens with the channels where its query is largest, and reads the
    best ones whole; the mean value stands for the others.

    With i1 the `r` channels of largest |q| (SparQ Attention, algorithm 1):

        s_hat = softmax(q[i1] K[:, i1]^T / tau),  tau = sqrt(k_dim |q[i1]|_1 / |q|_1)
        i2    = the k tokens of largest s_hat, the `local` last ones always
        out   = alpha softmax(q K[i2]^T / sqrt(k_dim)) V[i2] + (1 - alpha) mean(V)
        alpha = sum of s_hat over i2

    Query heads that share a KV head read the same: |q| is summed over them to choose the channels,
    and s_hat to choose the tokens (appendix on grouped-query attention); tau and alpha are each
    head's own. The defaults are the paper's r = 32 of 128 channels and k = 128, with the quarter of
    them local that its experiments use.

    Departures: `sqrt(k_dim)` is the model's own scale of products. The reference code sums the
    scores of shared heads before the softmax and adds the newest token to the k; here the paper is
    followed in both.
    """

    paper: ClassVar[str] = "SparQ Attention: Bandwidth-Efficient LLM Inference (arXiv:2312.04985)"
    reads_tokens: ClassVar[bool] = True
    r: int | float = param(0.25, "channels that score, or (a decimal) their share", above=0)
    k: int | float = param(
        128, "tokens that a step reads, or (a decimal) their share of the cached ones", above=0
    )
    local: float = param(0.25, "share of those that are the last tokens", minimum=0.0, maximum=1.0)

    def needs(self) -> Needs:
        return Needs(mean_value=True)

    def select(self, view: DecodeView) -> Selection | None:
        """k tokens per head; what a head with fewer has beyond its own are indices after its
        last."""
        heads, longest = len(view.lengths), int(view.lengths.max())
        k = _count(self.k, longest)
        if k >= longest:
            return None
        size = view.q.abs().float().view(heads, -1, view.q.shape[1])
        channels = size.sum(1).topk(_count(self.r, size.shape[2])).indices
        covered = size.gather(2, channels[:, None].expand(-1, size.shape[1], -1)).sum(2)
        share = (covered / size.sum(2)).nan_to_num(1.0)  # a query of zeros scores all alike

        s_hat = view.weights(channels=channels, divisors=share.flatten().sqrt())
        votes = group_sum(s_hat, heads)
        tokens = view.top_tokens(votes, k, last=max(1, int(self.local * k)))

        each = tokens.clamp_max(longest - 1).repeat_interleave(size.shape[1], 0)
        alpha = s_hat.gather(1, each).sum(1)
        return Selection(
            tokens=tokens, rest=view.mean_value(), rest_weight=(1 - alpha).clamp(0.0, 1.0)
        )


def _count(wanted: int | float, available: int) -> int:
    """A number, or the share of what is available, rounded up; at most all."""
    if isinstance(wanted, float):
        wanted = math.ceil(wanted * available)
    return min(wanted, available)
