"""Where numpy cannot index the pages, as on a GPU, torch does, and leaves the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tamis.cache import CacheLayout, LayerShape, PagedCache, SequenceCache
from tamis.cache.format import Field, PageFormat
from tamis.cache.pool import PagePool
from tests.cache.tokens import grow, stored

PAGE = 4
LAYOUT = CacheLayout((LayerShape(2, 8, 8), LayerShape(1, 8, 8)), PAGE, torch.float32)
SCORE = Field("score", torch.float32, 1)


def scatters(sequence: SequenceCache) -> None:
    generator = torch.Generator().manual_seed(0)
    sequence.accumulate(0, "score", torch.rand(2, 30, generator=generator), 0.5)


def keeps(sequence: SequenceCache) -> None:
    scatters(sequence)
    sequence.keep(0, [np.arange(0, 30, 3), np.array([1, 2, 29])])


def takes_out(sequence: SequenceCache) -> None:
    scatters(sequence)
    sequence.take_out(0, np.array([4, -1]))
    sequence.keys_values(0)
    sequence.keep(0, [np.arange(3, 29), np.arange(30)])


def retracts(sequence: SequenceCache) -> None:
    sequence.retract(6, [1, 5])


def copies_on_write(sequence: SequenceCache) -> None:
    twin = sequence.fork()
    grow(twin, range(100, 109))
    sequence.keep(1, [np.arange(1, 30, 2)])
    twin.free()


def swaps(sequence: SequenceCache) -> None:
    sequence.swap_out()
    sequence.swap_in()


def puts_away(sequence: SequenceCache) -> None:
    format = PageFormat.dense(PAGE, 8, 8, torch.float32)
    sequence.add_store("s", {0: format})
    sequence.put("s", [0], 8, stored(range(8), 2))
    sequence.stored("s", 0)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, pages are indexed as those of a device are."""

    def tensors(_: PagePool, tensor: torch.Tensor) -> Any:
        return tensor

    return lambda: monkeypatch.setattr(PagePool, "_indexable", tensors)


@pytest.mark.parametrize(
    "moves", [scatters, keeps, takes_out, retracts, copies_on_write, swaps, puts_away]
)
def test_the_bytes_are_the_same(
    moves: Callable[[SequenceCache], None], by_torch: Callable[[], None]
) -> None:
    left: list[torch.Tensor] = []
    for prepare in (lambda: None, by_torch):
        prepare()
        cache = PagedCache(LAYOUT, 1 << 20, swap_bytes=1 << 20)
        cache.arena.data.zero_()
        sequence = cache.new_sequence((SCORE,))
        grow(sequence, range(30))
        before = cache.arena.data.clone()
        moves(sequence)
        assert moves in (swaps, scatters) or not torch.equal(cache.arena.data, before)
        left.append(cache.arena.data)
    assert torch.equal(*left)
