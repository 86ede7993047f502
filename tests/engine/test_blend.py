"""Attention of tokens anywhere in a sequence is what it would be without those after them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tamis.attention.reference import attend as attend_naively
from tamis.cache import BatchView, CacheLayout, LayerShape, PagedCache, SequenceCache
from tamis.engine import blend
from tamis.engine.views import LayerOptions

Q_HEADS, HEADS, DIM, N = 4, 2, 16, 300


@pytest.fixture
def cache() -> SequenceCache:
    """A sequence of random tokens."""
    layout = CacheLayout((LayerShape(HEADS, DIM, DIM),), 16, torch.float32)
    memory = PagedCache(layout, 1 << 20)
    sequence, generator = memory.new_sequence(), torch.Generator().manual_seed(0)
    sequence.reserve(N)
    k, v = (torch.randn(N, HEADS, DIM, generator=generator) for _ in range(2))
    BatchView(memory, [sequence], [N], torch.arange(N, dtype=torch.int32)).append(0, k, v)
    sequence.advance(N)
    return sequence


@pytest.mark.parametrize(
    "at",
    [range(N), range(40, 90), range(7, 290, 3), [0], [299], [0, 299], [5, 6, 7, 100, 101, 298]],
    ids=str,
)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_each_token_sees_those_up_to_itself(
    cache: SequenceCache, at: Any, softcap: float | None, sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    positions = torch.tensor(list(at), dtype=torch.int32)
    q = torch.randn(len(positions), Q_HEADS, DIM, generator=generator)
    logits = torch.randn(Q_HEADS, generator=generator) if sinks else None
    all_k, all_v = cache.keys_values(0)  # [heads, N, dim]
    k, v = (part[:, positions.long()].transpose(0, 1) for part in (all_k, all_v))
    options = LayerOptions(0.3, None, softcap, logits)
    out, lse = blend.attend(q, k, v, cache.pages(0), positions, options)
    visible = torch.arange(N) <= positions[:, None]
    wide_k, wide_v = (part.repeat_interleave(Q_HEADS // HEADS, 0) for part in (all_k, all_v))
    wanted, wanted_lse = attend_naively(q.transpose(0, 1), wide_k, wide_v, visible, 0.3, softcap)
    wanted, wanted_lse = wanted.transpose(0, 1), wanted_lse.T
    if logits is not None:
        total = torch.logaddexp(wanted_lse, logits)
        wanted, wanted_lse = wanted * (wanted_lse - total).exp()[..., None], total
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-5, rtol=1e-4)


def test_deviation_is_the_norm_of_what_keys_and_values_change_by(cache: SequenceCache) -> None:
    tokens = torch.tensor([3, 17, 18, 250, 251])
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn(5, HEADS, DIM, generator=generator) for _ in range(2))
    life: Any = SimpleNamespace(cache=cache, fresh=251)
    found = blend.deviation(life, 0, tokens, k, v)
    old_k, old_v = cache.keys_values(0)
    for i, token in enumerate(tokens.tolist()[:4]):
        new = torch.cat([k[i].flatten(), v[i].flatten()])
        old = torch.cat([old_k[:, token].flatten(), old_v[:, token].flatten()])
        assert float(found[i]) == pytest.approx(float((new - old).norm()), rel=1e-5)
    assert found[4] == torch.inf
