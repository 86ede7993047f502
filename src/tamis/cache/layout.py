"""Which rows of pages a model's layers need, and how many bytes that is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from tamis.cache.format import Field, PageFormat
from tamis.cache.pool import IntArray
from tamis.errors import ConfigError

_BLOCK_BYTES = 1 << 20
_MIN_BLOCKS = 64
_SMALL_BLOCK_PAGES = 4
_FEWEST_BLOCKS = 8


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer caches per token.

    Attributes:
        kv_heads: number of KV heads.
        k_dim, v_dim: elements of one head's key and value.
        window: a query at position p sees positions p - window + 1 .. p; None for all.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None


@dataclass(frozen=True)
class CacheLayout:
    """The rows of a cache: one row per KV head per layer, layer after layer.

    Layers may differ in the number of heads, their dimensions and their windows; layers of the
    same dimensions share a page format.

    Attributes:
        layers: the attention layers, in order.
        page_size: tokens per page.
        dtype: of keys and values.
        columns: fields that every page holds after its keys, values and positions.
    """

    layers: tuple[LayerShape, ...]
    page_size: int
    dtype: torch.dtype
    columns: tuple[Field, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("the model has no attention layer, so there is nothing to cache")
        if self.page_size < 1:
            raise ConfigError(f"page_size is {self.page_size}; it must be at least 1")
        for layer in self.layers:
            if layer.window is not None and layer.window < 1:
                raise ConfigError(f"a layer's window is {layer.window}; it must be at least 1")

    def with_columns(self, columns: tuple[Field, ...]) -> CacheLayout:
        """The same rows with other side columns."""
        return replace(self, columns=columns)

    @cached_property
    def formats(self) -> tuple[PageFormat, ...]:
        """The distinct page formats.

        Raises:
            ConfigError: two columns have one name, or that of a field which every page has.
        """
        return tuple(dict.fromkeys(self._format(layer) for layer in self.layers))

    @cached_property
    def layer_formats(self) -> tuple[int, ...]:
        """For each layer the number of its format in `formats`."""
        return tuple(self.formats.index(self._format(layer)) for layer in self.layers)

    @cached_property
    def row_formats(self) -> IntArray:
        """For each row the number of its format in `formats`, int32 [n_rows]."""
        heads = [layer.kv_heads for layer in self.layers]
        return np.repeat(np.array(self.layer_formats, dtype=np.int32), heads)

    @cached_property
    def window_rows(self) -> IntArray:
        """The rows of layers with a window, int32 [m]."""
        return np.flatnonzero(self._row_windows).astype(np.int32)

    @cached_property
    def windows(self) -> IntArray:
        """The window of each of the `window_rows`, int32 [m]."""
        return self._row_windows[self.window_rows]

    @cached_property
    def n_rows(self) -> int:
        """KV heads of all layers together."""
        return sum(layer.kv_heads for layer in self.layers)

    def rows(self, layer: int) -> slice:
        """The rows of one layer's KV heads."""
        return self._slices[layer]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of pages per token of a long sequence: keys, values, positions and padding."""
        one_page_per_row = self.count(np.ones(self.n_rows, dtype=np.int32))
        return self.bytes_of(one_page_per_row) / self.page_size

    def bytes_for(self, n_tokens: int) -> int:
        """Bytes of the pages that a sequence of `n_tokens` tokens holds when none is evicted.

        Whole pages; of layers with a window only the pages that the next token can see into.
        """
        last = -(-n_tokens // self.page_size)
        first = np.zeros(self.n_rows, dtype=np.int64)
        first[self.window_rows] = np.maximum(n_tokens - self.windows + 1, 0) // self.page_size
        return self.bytes_of(self.count(last - first))

    def peak_pages(self, n_tokens: int, chunk: int | None = None) -> IntArray:
        """The most pages of each format that a sequence of `n_tokens` tokens can come to hold.

        Args:
            n_tokens: tokens cached in the end.
            chunk: the most tokens that are added at once; None if all of them may be.

        Returns:
            int32 [formats]. More than the pages of `bytes_for` where a layer with a window takes
            in a chunk before it can drop what lies behind the window.
        """
        held = np.full(self.n_rows, -(-n_tokens // self.page_size), dtype=np.int64)
        if chunk is not None:
            # window - 1 tokens before the chunk, beginning anywhere in their first page
            span = self.windows - 1 + chunk + self.page_size - 1
            held[self.window_rows] = np.minimum(held[self.window_rows], -(-span // self.page_size))
        return self.count(held)

    def count(self, pages: np.ndarray[tuple[int], np.dtype[np.integer]]) -> IntArray:
        """Sum pages per row, [n_rows], to pages per format, int32 [formats]."""
        counts = [pages[self.row_formats == i].sum() for i in range(len(self.formats))]
        return np.array(counts, dtype=np.int32)

    def bytes_of(self, pages: IntArray) -> int:
        """Bytes of so many pages of each format, int32 [formats]."""
        return sum(
            int(n) * format.page_bytes for n, format in zip(pages, self.formats, strict=True)
        )

    def block_bytes(self, capacity_bytes: int) -> int:
        """Size of the blocks of an arena: the same whatever the columns.

        Whole pages of the largest format without columns, about 1 MiB, and less where the arena
        is so small that rounding to blocks would cost much of it; but several pages where it can
        be, so that pages with columns fit too.
        """
        page_bytes = self._plain_page_bytes
        roomy = min(_SMALL_BLOCK_PAGES * page_bytes, capacity_bytes // _FEWEST_BLOCKS)
        target = min(_BLOCK_BYTES, max(capacity_bytes // _MIN_BLOCKS, roomy))
        return page_bytes * max(1, target // page_bytes)

    def capacity_for_page(self, page_bytes: int) -> int:
        """Bytes of an arena whose blocks hold a page of `page_bytes` bytes.

        Raises:
            ConfigError: no arena has so large blocks.
        """
        block_bytes = -(-page_bytes // self._plain_page_bytes) * self._plain_page_bytes
        if block_bytes > max(_BLOCK_BYTES, self._plain_page_bytes):
            raise ConfigError(
                f"a page of {page_bytes} bytes is larger than any block of memory can be "
                f"({_BLOCK_BYTES} bytes); choose a smaller page_size"
            )
        if block_bytes <= self._plain_page_bytes:
            return 0
        roomy = block_bytes <= _SMALL_BLOCK_PAGES * self._plain_page_bytes
        return block_bytes * (_FEWEST_BLOCKS if roomy else _MIN_BLOCKS)

    def blocks(self, block_bytes: int, pages: IntArray) -> int:
        """Blocks of an empty arena that so many pages of each format, int32 [formats], take."""
        return sum(
            -(-int(n) // (block_bytes // format.page_bytes))
            for n, format in zip(pages, self.formats, strict=True)
        )

    def capacity_for(self, pages: IntArray) -> int:
        """Bytes of an arena that holds so many pages, int32 [formats].

        Raises:
            ConfigError: no arena has blocks that hold a page of the largest format.
        """
        largest = max(format.page_bytes for format in self.formats)
        capacity = 0
        needed = max(self.bytes_of(pages), self.capacity_for_page(largest))
        while needed > capacity:  # larger arenas have larger blocks
            capacity = needed
            block_bytes = self.block_bytes(capacity)
            needed = self.blocks(block_bytes, pages) * block_bytes
        return capacity

    @cached_property
    def _plain_page_bytes(self) -> int:
        """Bytes of a page of the largest format without columns."""
        plain = self if not self.columns else replace(self, columns=())
        return max(format.page_bytes for format in plain.formats)

    @cached_property
    def _slices(self) -> tuple[slice, ...]:
        ends = np.cumsum([layer.kv_heads for layer in self.layers]).tolist()
        starts = [0, *ends[:-1]]
        return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))

    @cached_property
    def _row_windows(self) -> IntArray:
        """The window of each row, 0 for none."""
        heads = [layer.kv_heads for layer in self.layers]
        windows = np.array([layer.window or 0 for layer in self.layers], dtype=np.int32)
        return np.repeat(windows, heads)

    def _format(self, layer: LayerShape) -> PageFormat:
        plain = PageFormat.dense(self.page_size, layer.k_dim, layer.v_dim, self.dtype)
        return plain.extended(self.columns)
