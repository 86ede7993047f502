"""The cache as a whole: totals, limits, and memory that moves between formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.cache import CacheLayout, LayerShape, OutOfPages, PagedCache
from tamis.errors import ConfigError
from tests.cache import tokens

LAYOUT = CacheLayout((LayerShape(2, 8, 8), LayerShape(1, 4, 6, window=5)), 4, torch.float32)


def test_totals_follow_the_sequences() -> None:
    cache = PagedCache(LAYOUT, 60_000)
    sequence = cache.new_sequence()
    tokens.grow(sequence, range(10))
    assert cache.bytes_in_use == sequence.bytes
    assert cache.free_bytes == cache.capacity_bytes - sequence.bytes
    sequence.free()
    assert cache.free_bytes == cache.capacity_bytes
    assert cache.bytes_peak == 3 * (2 * 320 + 256)


def test_fits_is_about_an_empty_cache() -> None:
    cache = PagedCache(LAYOUT, 60_000)
    cache.new_sequence().reserve(100)
    assert cache.fits(300, chunk=8)
    assert not cache.fits(400, chunk=8)
    assert not cache.fits(300)  # at once, the layer with a window takes them all


def test_what_fits_can_be_cached() -> None:
    cache = PagedCache(LAYOUT, 60_000)
    longest = max(n for n in range(1, 500) if cache.fits(n, chunk=8))
    sequence = cache.new_sequence()
    for start in range(0, longest, 8):
        tokens.grow(sequence, range(start, min(start + 8, longest)))
    assert sequence.next_position == longest


def test_an_arena_too_small_for_a_page_fits_nothing() -> None:
    cache = PagedCache(LAYOUT, 100)
    assert cache.capacity_bytes == 0
    assert not cache.fits(1)
    with pytest.raises(OutOfPages):
        cache.new_sequence().reserve(1)
    assert PagedCache(LAYOUT, cache.required_bytes(1)).fits(1)


def test_pages_of_all_formats_are_allocated_together_or_not_at_all() -> None:
    cache = PagedCache(LAYOUT, 6 * 320)
    assert cache.device_tier.can_allocate(np.array([4, 2], dtype=np.int32))
    assert not cache.device_tier.can_allocate(np.array([4, 3], dtype=np.int32))
    with pytest.raises(OutOfPages, match=r"\[4, 3\] pages wanted"):
        cache.device_tier.allocate(np.array([0, 1, 0, 1, 0, 1, 0], dtype=np.int32))
    assert cache.bytes_in_use == 0


def test_memory_of_one_format_serves_another() -> None:
    cache = PagedCache(LAYOUT, 6 * 320)
    formats = np.array([0] * 6, dtype=np.int32)
    ids = cache.device_tier.allocate(formats)
    assert not cache.device_tier.can_allocate(np.array([0, 1], dtype=np.int32))
    cache.device_tier.release(ids, formats)
    assert cache.device_tier.can_allocate(np.array([0, 6], dtype=np.int32))
    mixed = np.array([1, 0, 1, 0, 1, 1], dtype=np.int32)
    ids = cache.device_tier.allocate(mixed)
    cache.device_tier.retain(ids[:2], mixed[:2])
    assert cache.device_tier.shared(ids, mixed).tolist() == [True, True, False, False, False, False]
    assert cache.bytes_in_use == 4 * 256 + 2 * 320


def test_a_negative_swap_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="swap_bytes is -1"):
        PagedCache(LAYOUT, 60_000, swap_bytes=-1)
