"""Differentiable attention is attention, and its gradients are those of the formula."""

import pytest
import torch

from tamis.attention import prefill
from tamis.train.methods import differentiable
from tamis.train.methods.differentiable import causal_attention

TOKENS, Q_HEADS, KV_HEADS, DIM = 40, 4, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(differentiable, "_BLOCK", 16)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(TOKENS, heads, DIM, generator=generator)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 7}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}],
    ids=["plain", "window", "softcap", "sinks"],
)
def test_it_is_the_engines_attention(options):
    q, k, v = tensors()
    expected, _ = prefill(q, k, v, None, scale=0.3, positions=torch.arange(TOKENS), **options)
    torch.testing.assert_close(causal_attention(q, k, v, scale=0.3, **options), expected)


@pytest.mark.parametrize(("first", "recent"), [(0, 5), (3, 5), (3, 30), (10, 1), (64, 256)])
def test_a_streaming_head_sees_first_and_recent_tokens(first, recent):
    q, k, v = tensors(1)
    streaming = causal_attention(
        q, k, v, scale=0.3, first_tokens=first, recent_tokens=recent, window=25
    )
    for i in range(TOKENS):
        seen = [j for j in range(i + 1) if (j < first or j > i - recent) and j > i - 25]
        for head in range(Q_HEADS):
            own = head // 2
            weights = (0.3 * k[seen, own] @ q[i, head]).softmax(0)
            torch.testing.assert_close(streaming[i, head], weights @ v[seen, own])


def test_gradients_are_those_of_plain_softmax():
    tracked = [x.requires_grad_() for x in tensors(2)]
    causal_attention(*tracked, scale=0.3).square().sum().backward()
    found = [x.grad for x in tracked]
    q, k, v = (x.detach().requires_grad_() for x in tracked)
    scores = 0.3 * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1))
    hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1)).square().sum().backward()
    for one, x in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(one, x.grad, rtol=1e-4, atol=1e-5)
