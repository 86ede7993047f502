"""Pages that a sequence holds beside its live ones: another format, another tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tamis.cache.format import UNIT, PagedKV, PageFormat
from tamis.cache.pool import IntArray, PageError
from tamis.cache.tables import PageTables, check_shape
from tamis.cache.tier import Tier
from tamis.cache.transfers import fetch


class Store(PageTables):
    """Tokens of some layers in pages that are written once, whole, and then only read.

    Because pages are never written again, layers and forks share them by reference.

    Attributes:
        name: what its sequence calls it.
        formats: the page format of each layer that it covers.
        bytes: of the pages held; a page that several rows hold counts once.
    """

    def __init__(
        self,
        name: str,
        tier: Tier,
        formats: Mapping[int, PageFormat],
        kv_heads: Mapping[int, int],
    ) -> None:
        """An empty store.

        Args:
            name: what its sequence calls it.
            tier: where its pages lie.
            formats: the page format of each layer that it covers.
            kv_heads: KV heads of each of these layers.

        Raises:
            ConfigError: a page does not fit the blocks of the tier's memory.
        """
        numbers = [tier.number(format) for format in formats.values()]
        heads = [kv_heads[layer] for layer in formats]
        super().__init__(tier, np.repeat(np.array(numbers, dtype=np.int32), heads))
        ends = np.cumsum(heads).tolist()
        self.name = name
        self.formats = dict(formats)
        self.bytes = 0
        self._slices = {
            layer: slice(end - n, end) for layer, n, end in zip(formats, heads, ends, strict=True)
        }

    def rows(self, layer: int) -> slice:
        """The rows of one layer's KV heads.

        Raises:
            PageError: the store does not cover the layer.
        """
        if layer not in self._slices:
            raise PageError(f"store {self.name!r} covers the layers {[*self._slices]}, not {layer}")
        return self._slices[layer]

    def put(
        self,
        layers: Sequence[int],
        n_tokens: int,
        fields: Mapping[str, torch.Tensor],
        heads: Sequence[int] | None = None,
    ) -> None:
        """Append tokens; see `SequenceCache.put`."""
        rows = self._rows_to_put(layers, heads)
        format = self.formats[layers[0]]
        _check_fields(format, fields, len(rows[0]), n_tokens)
        n_pages = format.pages_for(n_tokens)
        counts = np.full(len(rows[0]), n_pages, dtype=np.int32)
        pool = self.pool(self.rows(layers[0]))
        ids = pool.allocate(int(counts.sum()))
        for field in format.fields:
            pool.scatter(
                ids, field.name, _in_pages(fields[field.name], n_pages, field.rows, format)
            )
        for of_layer in rows:
            self._append_pages(of_layer, counts, ids)
            self.lengths[of_layer] += n_tokens
        pool.retain(np.tile(ids, len(rows) - 1))
        self.bytes += ids.size * pool.page_bytes

    def read(
        self, layer: int, first: int, last: int | None, fields: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """A copy of the pages' fields; see `SequenceCache.stored`."""
        rows = self.rows(layer)
        format, longest = self.formats[layer], int(self.lengths[rows].max())
        most = format.pages_for(longest)
        last = most if last is None else min(last, most)
        first = min(first, last)
        start, stop = (min(page * format.page_size, longest) for page in (first, last))
        return {
            field.name: self.read_tokens(rows, field.name, start, stop)
            if field.rows is None
            else self.read_pages(rows, field.name, first, last)
            for field in format.fields
            if fields is None or field.name in fields
        }

    def pages(self, layer: int, device: torch.device) -> PagedKV:
        """A layer's pages for kernels on `device`; see `SequenceCache.store_pages`."""
        rows, format = self.rows(layer), self.formats[layer]
        names = [field.name for field in format.fields]
        if names[:3] != ["k", "v", "position"]:
            raise PageError(f"store {self.name!r} holds {names}, which no attention kernel reads")
        pages = self.paged(rows)
        return pages if pages.data.device == device else self.staged(layer, device)

    def staged(self, layer: int, device: torch.device) -> PagedKV:
        """A copy of a layer's pages on `device`, one after the other."""
        ids, *of_rows = self.laid_out(layer)
        pool = self.pool(self.rows(layer))
        words = torch.empty((ids.size, pool.page_bytes // 8), dtype=torch.int64, device=device)
        fetch(pool, ids, words)
        tables, lengths = (torch.from_numpy(array).to(device) for array in of_rows)
        return PagedKV(words.view(torch.uint8).flatten(), pool.format, tables, lengths)

    def laid_out(self, layer: int) -> tuple[IntArray, IntArray, IntArray]:
        """How a layer's pages are read when they have been copied one after the other.

        Returns:
            The pages in this order, int32 [n]; tables that name them by their new places, int32
            [1, kv_heads, most pages]; and the lengths, int32 [1, kv_heads].
        """
        rows = self.rows(layer)
        counts = self.page_counts[rows]
        held = np.arange(int(counts.max())) < counts[:, None]
        ids: IntArray = self.tables[rows, : held.shape[1]][held]
        tables = np.zeros((1, *held.shape), dtype=np.int32)
        tables[0, held] = np.arange(ids.size) * (self.pool(rows).page_bytes // UNIT)
        return ids, tables, self.lengths[None, rows].copy()

    def fork(self) -> Store:
        """A second store that holds the same pages."""
        kv_heads = {layer: rows.stop - rows.start for layer, rows in self._slices.items()}
        other = Store(self.name, self.tier, self.formats, kv_heads)
        self.share_into(other, self.page_counts)
        other.bytes = self.bytes
        return other

    def clear(self, layer: int) -> None:
        """Give a layer's pages back; those that other layers hold stay with them."""
        rows = self.rows(layer)
        counts = np.zeros_like(self.page_counts)
        counts[rows] = self.page_counts[rows]
        self.tier.release(*self.held(counts))
        self.page_counts[rows] = 0
        self.lengths[rows] = 0
        ids, pools = self.held()
        _, first = np.unique(ids, return_index=True)
        self.bytes = self.tier.bytes_of(pools[first])

    def free(self) -> None:
        """Give all pages back."""
        self.release_all()
        self.bytes = 0

    def _rows_to_put(self, layers: Sequence[int], heads: Sequence[int] | None) -> list[IntArray]:
        """Per layer the rows that a put appends to, which all end with a whole page."""
        if len(set(layers)) < len(layers) or not layers:
            raise PageError(f"put needs distinct layers, got {list(layers)}")
        spans = [self.rows(layer) for layer in layers]
        sizes = {span.stop - span.start for span in spans}
        if len(sizes) > 1 or len({self.formats[layer] for layer in layers}) > 1:
            raise PageError(
                f"layers {list(layers)} differ in KV heads or format, so they cannot share pages"
            )
        chosen = np.arange(sizes.pop()) if heads is None else np.array(heads, dtype=np.int64)
        if (
            not set(chosen.tolist()) <= set(range(spans[0].stop - spans[0].start))
            or (np.diff(chosen) <= 0).any()
        ):
            raise PageError(f"put needs ascending heads of layer {layers[0]}, got {heads}")
        rows = [(chosen + span.start).astype(np.int32) for span in spans]
        page_size = self.formats[layers[0]].page_size
        if any((self.lengths[of_layer] % page_size).any() for of_layer in rows):
            raise PageError(f"the last page of store {self.name!r} is partly filled, and final")
        return rows


def together(stores: Sequence[Store]) -> tuple[torch.Tensor, torch.Tensor]:
    """The page tables, int32 [n, rows, most pages], and lengths, int32 [n, rows], of the device's
    stores of some sequences, which cover the same layers; `Store.rows` are a layer's rows."""
    width = max(int(store.page_counts.max(initial=0)) for store in stores)
    tables = np.zeros((len(stores), stores[0].lengths.size, width), dtype=np.int32)
    for i, store in enumerate(stores):
        mine = store.tables[:, :width]
        tables[i, :, : mine.shape[1]] = mine
    lengths = np.stack([store.lengths for store in stores])
    device = stores[0].tier.arena.data.device
    return torch.from_numpy(tables).to(device), torch.from_numpy(lengths).to(device)


def _in_pages(
    values: torch.Tensor, n_pages: int, rows: int | None, format: PageFormat
) -> torch.Tensor:
    """Values of one field, as `put` takes them, page by page: [heads * n_pages, rows, width]."""
    if rows is not None:
        return values.flatten(0, 1)
    heads, n_tokens, width = values.shape
    missing = n_pages * format.page_size - n_tokens
    if missing:
        values = torch.cat([values, values.new_zeros(heads, missing, width)], dim=1)
    return values.reshape(heads * n_pages, format.page_size, width)


def _check_fields(
    format: PageFormat, fields: Mapping[str, torch.Tensor], heads: int, n_tokens: int
) -> None:
    """Raise ValueError unless `fields` are those of the format for `n_tokens` tokens."""
    wanted = [field.name for field in format.fields]
    if set(fields) != set(wanted):
        raise ValueError(f"put needs the fields {wanted}, got {sorted(fields)}")
    for field in format.fields:
        values = fields[field.name]
        if field.rows is None:
            shape: tuple[int, ...] = (heads, n_tokens, field.width)
        else:
            shape = (heads, format.pages_for(n_tokens), field.rows, field.width)
        check_shape(field.name, values, shape)
        if values.dtype != field.dtype:
            raise ValueError(f"{field.name} must be {field.dtype}, got {values.dtype}")
