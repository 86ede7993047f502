"""RazorAttention's probe: which heads look for earlier occurrences of the current token."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.attention import prefill
from tamis.model import Model
from tamis.train.methods.save import stacked


class RepetitionProbe:
    """An `Attend` that attends in full and scores every head on a text that repeats itself.

    With `w_ij` the softmax weight of query i on key j, and a text of period K, a query at i >= K
    has the echo weight `sum_r w_i,i-rK` (r = 1, 2, ...: the same token before) and the induction
    weight `sum_r w_i,i-rK+1` (what followed it). Scores are their means over those queries.

    The weights are computed from the attention's log-sum-exp at these pairs only, so memory is
    linear in the text.

    Attributes:
        echo, induction: per layer, fp32 [kv_heads]: the highest of the query heads that share it.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self.echo: list[Tensor] = []
        self.induction: list[Tensor] = []

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        positions = torch.arange(len(q), device=q.device)
        out, lse = prefill(
            q, k, v, None, scale=scale, positions=positions, window=window, softcap=softcap,
            sinks=sinks,
        )  # fmt: skip

        def mean_weight(shift: int) -> Tensor:
            total = q.new_zeros(q.shape[1], dtype=torch.float32)
            for distance in range(self.period, len(q), self.period):
                behind = distance - shift
                if window is not None and behind >= window:
                    break
                total += _weights(q, k, lse, behind, scale, softcap)[distance - behind :].sum(0)
            per_head = total / (len(q) - self.period)
            return per_head.view(k.shape[1], -1).amax(1)

        self.echo.append(mean_weight(0))
        self.induction.append(mean_weight(1))
        return out


def _weights(
    q: Tensor, k: Tensor, lse: Tensor, behind: int, scale: float, softcap: float | None
) -> Tensor:
    """Softmax weights of every query on the key `behind` tokens before it, fp32
    [tokens - behind, q_heads], from the first query that has one."""
    group = q.shape[1] // k.shape[1]
    keys = k[: len(k) - behind].float().repeat_interleave(group, dim=1)
    scores = scale * (q[behind:].float() * keys).sum(-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.exp(scores - lse[behind:])


def fit(model: Model, *, tokens: int = 2500, repeats: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Echo and induction scores of every KV head (RazorAttention, section 3.2).

    The model reads `tokens` random tokens, `repeats` times over; the paper's 2500 and 4, or as
    many tokens as its context allows.

    Returns:
        `echo` and `induction`, fp32 [layers, most KV heads], layers with fewer padded with 0.
    """
    period = min(tokens, model.max_length // repeats)
    generator = torch.Generator().manual_seed(seed)
    special = model.tokenizer.all_special_ids if model.tokenizer is not None else []
    ordinary = torch.tensor([i for i in range(model.vocab_size) if i not in set(special)])
    drawn = ordinary[torch.randint(len(ordinary), (period,), generator=generator)]
    ids = drawn.repeat(repeats).to(model.device)
    at = torch.arange(len(ids), device=model.device)
    probe = RepetitionProbe(period)
    model.forward(ids, at, at[:0], probe, rope_lengths=torch.full_like(at, len(ids)))
    return {"echo": stacked(probe.echo), "induction": stacked(probe.induction)}
