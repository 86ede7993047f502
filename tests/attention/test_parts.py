"""Attention over parts equals attention over their union."""

from __future__ import annotations

import torch

from tamis.attention.parts import KVPart, attend_parts


def whole(q, k, v, visible, scale, softcap):
    """Softmax attention of every query head over all keys at once."""
    group = q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = torch.einsum("thd,hnd->htn", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible.repeat_interleave(group, 0), -torch.inf)
    return torch.einsum("htn,hnd->thd", scores.softmax(-1), v), scores.logsumexp(-1).T


def test_parts_merge_to_attention_over_all_of_them():
    torch.manual_seed(0)
    for softcap in (None, 2.0):
        q, k, v = torch.randn(5, 6, 8), torch.randn(2, 11, 8), torch.randn(2, 11, 4)
        visible = torch.rand(2, 5, 11) < 0.6
        visible[:, :, 0] = True
        cuts = ((0, 4), (4, 5), (5, 11))
        parts = [KVPart(k[:, a:b], v[:, a:b], visible[:, :, a:b]) for a, b in cuts]
        out, lse = attend_parts(q, iter(parts), 4, scale=0.4, softcap=softcap)
        expected = whole(q, k, v, visible, 0.4, softcap)
        torch.testing.assert_close((out, lse), expected)


def test_a_counted_token_weighs_like_so_many_equal_ones():
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 4, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    other = KVPart(torch.randn(2, 6, 8), torch.randn(2, 6, 8))
    five = KVPart(k.expand(2, 5, 8), v.expand(2, 5, 8))
    one = KVPart(k, v, log_count=torch.full((2, 1), 5.0).log())
    options = {"scale": 0.3, "softcap": None}
    expected = attend_parts(q, [other, five], 8, **options)
    torch.testing.assert_close(attend_parts(q, [other, one], 8, **options), expected)


def test_a_query_that_sees_nothing_is_zero():
    q = torch.randn(2, 2, 4)
    part = KVPart(
        torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.zeros(1, 2, 3, dtype=torch.bool)
    )
    out, lse = attend_parts(q, [part], 4, scale=1.0, softcap=None)
    assert not out.any()
    assert (lse == -torch.inf).all()
