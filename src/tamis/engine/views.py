"""What the methods see: the views of `tamis.methods.views`, computed from pages when asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tamis.attention import observe
from tamis.attention.reference import TILE, gather_kv
from tamis.cache import PagedKV
from tamis.methods.views import ModelShape

if TYPE_CHECKING:
    from tamis.engine.lifecycle import Lifecycle


@dataclass(frozen=True)
class LayerOptions:
    """How a layer's attention is computed: see `tamis.model.Attend`."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


ATTENTION = "attention"
"""The side column of attention sums."""


class _View:
    """What all views say of their layer."""

    def __init__(self, life: Lifecycle, layer: int) -> None:
        self._life = life
        self._layer = life.layers[layer]
        self.layer = layer
        self.shape: ModelShape = life.shape
        self.prompt_tokens = life.prompt_tokens

    @property
    def state(self) -> dict[str, Any]:
        return self._layer.state

    @property
    def options(self) -> LayerOptions:
        """The layer's, as its last step handed them over."""
        options = self._layer.options
        assert options is not None
        return options

    @property
    def scale(self) -> float:
        return self.options.scale


class CachedLayer(_View):
    """A `LayerView`: one layer of one request between two steps.

    For decisions that look at each head by itself it may be several layers of one shape, whose
    heads follow one another; `layer` is then the first.
    """

    def __init__(self, life: Lifecycle, layer: int, n_layers: int = 1) -> None:
        super().__init__(life, layer)
        self.layers = range(layer, layer + n_layers)

    @cached_property
    def lengths(self) -> Tensor:
        lengths = self._life.cache.lengths_of(self.layers)
        return torch.from_numpy(lengths).long().to(self._life.device)

    @cached_property
    def cached(self) -> Tensor:
        longest = int(self.lengths.max())
        return torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def positions(self) -> Tensor:
        return self._life.cache.positions_of(self.layers).long()

    def queries(self, n: int) -> Tensor:
        queries = self._layer.queries
        assert queries is not None, "the plan's methods did not declare that they need queries"
        return queries[-n:]

    def window(self, n: int) -> Tensor:
        q = self.queries(n)
        at = torch.tensor(self._life.query_positions[-len(q) :], device=q.device)
        options = self.options
        return observe.window_weights(
            q,
            self._life.cache.pages(self.layer),
            scale=options.scale,
            positions=at,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
        )

    def attention(self) -> Tensor:
        return self._life.cache.column(self.layers, ATTENTION)[..., 0]

    def similarity(self) -> float:
        total, tokens = self._layer.similarity
        return total / max(1, tokens)

    def keys_values(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        return self._life.cache.keys_values(self.layers, start, stop)


class PromptChunk(_View):
    """A `ChunkView`: a chunk of a prompt, its keys already in the pages."""

    def __init__(
        self, life: Lifecycle, layer: int, q: Tensor, pages: PagedKV, positions: Tensor
    ) -> None:
        """`pages` [1 row] hold the chunk's own tokens too; `positions` [tokens] are theirs."""
        super().__init__(life, layer)
        self.q = q
        self.lengths = pages.lengths[0].long() - len(q)
        self._pages = pages
        self._positions = positions

    def window(self, n: int) -> Tensor:
        options = self.options
        return observe.window_weights(
            self.q[-n:],
            self._pages,
            scale=options.scale,
            positions=self._positions[-n:],
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
        )

    def pooled_queries(self, block: int) -> Tensor:
        return observe.pooled(self.q, block)

    def pooled_keys(self, block: int) -> Tensor:
        tile = block * max(1, TILE // block)
        longest = int(self._pages.lengths.max())
        means = []
        for start in range(0, longest, tile):
            stop = min(start + tile, longest)
            k, _ = gather_kv(self._pages, start, stop)
            means.append(observe.pooled(k[0].transpose(0, 1), block))
        return torch.cat(means, dim=1)


class DecodeQuery(_View):
    """A `DecodeView`: the query of one new token, its own key already in the pages."""

    def __init__(self, life: Lifecycle, layer: int, q: Tensor, pages: PagedKV) -> None:
        """`q` [1, q_heads, k_dim]; `pages`: one row, the new token among them."""
        super().__init__(life, layer)
        self.q = q[0]
        self._pages = pages
        self.page_size = pages.format.page_size

    @cached_property
    def lengths(self) -> Tensor:
        live = self._pages.lengths[0].long()
        if self._life.plan.codec is None:
            return live
        return live + self._life.encoded_lengths(self.layer)

    def summary(self, name: str) -> Tensor:
        return self._life.summary(self.layer, name)

    def top_pages(self, low: str, high: str, count: int) -> Tensor:
        cache = self._life.cache
        pages = self._pages
        format = cache.pool(cache.layout.rows(self.layer)).format  # with the plan's columns
        return observe.top_pages(
            self.q[None],
            PagedKV(pages.data, format, pages.tables, pages.lengths),
            count,
            low=low,
            high=high,
            before=self._life.encoded_pages(self.layer),
        )[0]

    def weights(
        self,
        *,
        channels: Tensor | None = None,
        divisors: Tensor | None = None,
        first: int = 0,
        last: int = 0,
    ) -> Tensor:
        options = self.options
        return observe.token_weights(
            self.q[None],
            self._pages,
            scale=options.scale,
            softcap=options.softcap,
            channels=None if channels is None else channels[None],
            divisors=None if divisors is None else divisors[None],
            first=first,
            last=last,
        )[0]

    def top_tokens(self, values: Tensor, count: int, *, first: int = 0, last: int = 0) -> Tensor:
        lengths = self.lengths if len(values) == len(self.lengths) else self.lengths.amax(0, True)
        return observe.top_tokens(values, lengths, count, first=first, last=last)

    def mean_value(self) -> Tensor:
        total, tokens = self._layer.values
        assert total is not None, "the plan's methods did not declare that they need mean values"
        return total / max(1, tokens)
