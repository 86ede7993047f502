"""The layout's formulas are what sequences really hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.cache import CacheLayout, Field, LayerShape, PagedCache
from tamis.errors import ConfigError
from tests.cache import tokens

PLAIN = (LayerShape(2, 8, 8), LayerShape(2, 8, 8))
MIXED = (LayerShape(2, 8, 8), LayerShape(1, 4, 6, window=9), LayerShape(3, 8, 8, window=5))


def test_rows_follow_the_layers() -> None:
    layout = CacheLayout(MIXED, 4, torch.float32)
    assert layout.n_rows == 6
    assert [layout.rows(i) for i in range(3)] == [slice(0, 2), slice(2, 3), slice(3, 6)]
    assert layout.layer_formats == (0, 1, 0)
    assert layout.row_formats.tolist() == [0, 0, 1, 0, 0, 0]
    assert [format.field("v").width for format in layout.formats] == [8, 6]
    assert layout.window_rows.tolist() == [2, 3, 4, 5]
    assert layout.windows.tolist() == [9, 5, 5, 5]


def test_bytes_for_is_whole_pages_per_head() -> None:
    layout = CacheLayout(PLAIN, 4, torch.float32)  # a page: 128 + 128 + 64 bytes
    assert [layout.bytes_for(n) // (4 * 320) for n in (0, 1, 4, 5, 400)] == [0, 1, 1, 2, 100]
    assert layout.bytes_per_token == 4 * 320 / 4


def test_a_token_takes_its_keys_values_and_position() -> None:
    layout = CacheLayout((LayerShape(2, 64, 64),), 16, torch.bfloat16)
    assert layout.bytes_per_token == 2 * (256 + 4)


@pytest.mark.parametrize("layers", [PLAIN, MIXED])
@pytest.mark.parametrize("page_size", [1, 4, 8])
@pytest.mark.parametrize("chunk", [1, 3, 30])
def test_a_sequence_holds_bytes_for_its_length_and_never_more_than_the_peak(
    layers: tuple[LayerShape, ...], page_size: int, chunk: int
) -> None:
    layout = CacheLayout(layers, page_size, torch.float32)
    for n_tokens in (1, 9, 31):
        cache = PagedCache(layout, 100_000)
        sequence = cache.new_sequence()
        most = np.zeros(len(layout.formats), dtype=np.int32)
        for start in range(0, n_tokens, chunk):
            sequence.reserve(min(chunk, n_tokens - start))
            most = np.maximum(most, layout.count(sequence.page_counts))
            tokens.append(cache, [sequence], [range(start, min(start + chunk, n_tokens))])
            sequence.trim()
            assert cache.bytes_in_use == layout.bytes_for(sequence.next_position)
        assert (most <= layout.peak_pages(n_tokens, chunk)).all()
        assert (layout.peak_pages(n_tokens, chunk) <= layout.peak_pages(n_tokens)).all()


def test_the_peak_of_a_long_prompt_in_chunks_is_bounded_by_the_windows() -> None:
    layout = CacheLayout((LayerShape(1, 8, 8, window=64),), 16, torch.float32)
    assert layout.peak_pages(100_000, chunk=32).tolist() == [7]  # 63 + 32 tokens, any alignment
    assert layout.peak_pages(100_000).tolist() == [6250]


@pytest.mark.parametrize("layers", [PLAIN, MIXED])
@pytest.mark.parametrize("n_tokens", [1, 17, 5000])
def test_the_required_capacity_is_enough_and_not_much_more(
    layers: tuple[LayerShape, ...], n_tokens: int
) -> None:
    layout = CacheLayout(layers, 4, torch.float32)
    needed = layout.bytes_of(layout.peak_pages(n_tokens))
    required = layout.capacity_for(layout.peak_pages(n_tokens))
    cache = PagedCache(layout, required)
    assert cache.fits(n_tokens)
    assert cache.required_bytes(n_tokens) == required
    assert needed <= required <= 1.1 * needed + 2 * 320
    cache.new_sequence().reserve(n_tokens)
    assert not PagedCache(layout, needed - 1).fits(n_tokens)


def test_a_single_format_wastes_less_than_a_block() -> None:
    layout = CacheLayout(PLAIN, 4, torch.float32)
    for capacity in (320, 5_000, 1_000_000, 100_000_000):
        cache = PagedCache(layout, capacity)
        assert cache.capacity_bytes % 320 == 0
        assert capacity - cache.capacity_bytes < max(320, capacity // 64)
        assert cache.pools[0].free_pages * 320 == cache.capacity_bytes


@pytest.mark.parametrize(
    ("layers", "page_size", "message"),
    [
        ((), 16, "no attention layer"),
        (PLAIN, 0, "page_size is 0"),
        ((LayerShape(1, 8, 8, window=0),), 16, "window is 0"),
    ],
)
def test_impossible_layouts_are_refused(
    layers: tuple[LayerShape, ...], page_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheLayout(layers, page_size, torch.float32)


def test_small_arenas_have_blocks_for_larger_pages_too() -> None:
    layout = CacheLayout(PLAIN, 4, torch.float32)
    blocks = [layout.block_bytes(pages * 320) // 320 for pages in (1, 15, 16, 32, 99)]
    assert blocks == [1, 1, 2, 4, 4]


@pytest.mark.parametrize("page_bytes", [64, 320, 321, 640, 1280, 1281, 5_000, 1_000_000])
def test_the_capacity_for_a_page_is_enough(page_bytes: int) -> None:
    layout = CacheLayout(PLAIN, 4, torch.float32)
    assert layout.block_bytes(layout.capacity_for_page(page_bytes)) >= page_bytes


def test_columns_change_the_formats_and_not_the_blocks() -> None:
    layout = CacheLayout(MIXED, 4, torch.float32)
    extended = layout.with_columns((Field("score", torch.float32, 1),))
    assert [format.page_bytes for format in extended.formats] == [384, 320]
    assert extended.layer_formats == layout.layer_formats
    assert extended.bytes_for(8) > layout.bytes_for(8)
    assert extended.block_bytes(100_000) == layout.block_bytes(100_000)
