"""What methods see: read-only views of a request, and the small values they hand back.

The engine implements the views. Whatever a view computes, it computes when it is asked, so a batch
pays for the statistics that its plans use and for no others. All tensors are on the engine's
device. Heads may hold different numbers of tokens: tensors over tokens are padded to the longest
head, with `cached` saying what is real. A query head `h` reads the KV head `h // (q_heads //
kv_heads)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """One attention layer: its heads, their dimensions, and its sliding window if it has one."""

    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """What a method may know of the model.

    Attributes:
        layers: the attention layers, in order.
        vocab_size: number of token ids.
        dtype: of keys and values.
        directory: where the model's files lie, and with them what `tamis train METHOD` has fitted
            (`<directory>/tamis/<method>.safetensors`); None for a model that has no files.
    """

    layers: tuple[LayerShape, ...]
    vocab_size: int
    dtype: torch.dtype
    directory: Path | None = None

    @property
    def n_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class Column:
    """A value that the cache keeps beside keys and values.

    Attributes:
        name: unique within the plan.
        dtype, width: elements of one row.
        rows: rows per page; None for one row per token.
    """

    name: str
    dtype: torch.dtype
    width: int
    rows: int | None = None


@dataclass(frozen=True)
class Needs:
    """What the engine must gather while a request runs, because it cannot be had afterwards.

    Attributes:
        queries: the last so many queries of every layer are kept (`LayerView.queries`, `.window`).
        attention: attention sums are kept per token, in a side column: every query adds its
            softmax weights (`LayerView.attention`).
        decay: what each new query multiplies those sums by; 1 forgets nothing.
        similarity: the mean cosine similarity of the hidden states before and after the attention
            of every layer (`LayerView.similarity`).
        mean_value: the mean of all values per head (`DecodeView.mean_value`).
    """

    queries: int = 0
    attention: bool = False
    decay: float = 1.0
    similarity: bool = False
    mean_value: bool = False

    @property
    def in_steps(self) -> bool:
        """Whether anything must be gathered of a layer's queries, keys and values."""
        return self.queries > 0 or self.attention or self.mean_value

    def __or__(self, other: Needs) -> Needs:
        """What both need."""
        return Needs(
            max(self.queries, other.queries),
            self.attention or other.attention,
            min(self.decay, other.decay),
            self.similarity or other.similarity,
            self.mean_value or other.mean_value,
        )


class LayerView(Protocol):
    """One layer of one request, between two steps.

    Attributes:
        layer: its index; shape: of the model.
        prompt_tokens: tokens of the whole prompt, cached or not.
        lengths: cached tokens per head, int64 [kv_heads].
        cached: which tokens are real, bool [kv_heads, tokens].
        positions: absolute positions in the text, int64 [kv_heads, tokens], ascending; -1 where
            none.
        state: what the plan's methods remember about this layer, by names of their own. Values
            are replaced, never changed in place: forks of the request share them.
    """

    @property
    def layer(self) -> int: ...

    @property
    def shape(self) -> ModelShape: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def lengths(self) -> Tensor: ...

    @property
    def cached(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def state(self) -> dict[str, Any]: ...

    def queries(self, n: int) -> Tensor:
        """The last `n` queries, or all there were, [m, q_heads, k_dim]. Needs `queries`."""

    def window(self, n: int) -> Tensor:
        """Softmax weights of the last `n` queries (or all) over what is cached, causal, fp32
        [q_heads, m, tokens], zero where nothing is seen. Needs `queries`."""

    def attention(self) -> Tensor:
        """Sum over all queries so far, and over the query heads that share a KV head, of the
        softmax weight of each cached token, fp32 [kv_heads, tokens]. Needs `attention`."""

    def similarity(self) -> float:
        """Mean cosine similarity of the hidden states before and after this layer's attention,
        over the tokens of the prompt. Needs `similarity`."""

    def keys_values(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values of the tokens start..stop, in their dtype,
        [kv_heads, n, k_dim] and [kv_heads, n, v_dim], zero where none."""


class ChunkView(Protocol):
    """A chunk of a prompt at one layer, before its attention is computed.

    Keys are numbered per head: first the cached ones, then the chunk's own.

    Attributes:
        q: the chunk's queries, [tokens, q_heads, k_dim].
        lengths: keys that are cached already, per head, int64 [kv_heads].
        prompt_tokens, layer, shape, state: as in `LayerView`.
    """

    @property
    def layer(self) -> int: ...

    @property
    def shape(self) -> ModelShape: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def q(self) -> Tensor: ...

    @property
    def lengths(self) -> Tensor: ...

    @property
    def state(self) -> dict[str, Any]: ...

    def window(self, n: int) -> Tensor:
        """Softmax weights of the chunk's last `n` queries (or all) over all keys, causal, fp32
        [q_heads, m, keys]."""

    def pooled_queries(self, block: int) -> Tensor:
        """Means of the chunk's queries over blocks of `block`, [q_heads, blocks, k_dim], fp32."""

    def pooled_keys(self, block: int) -> Tensor:
        """Means of all keys over blocks of `block`, [kv_heads, blocks, k_dim], fp32."""

    @property
    def scale(self) -> float:
        """Factor of the products of queries and keys."""


class DecodeView(Protocol):
    """A request that adds one token, at one layer, the new token's key and value included.

    Attributes:
        q: the new token's query, [q_heads, k_dim].
        lengths: cached tokens per head, the new one included, int64 [kv_heads].
        page_size: tokens per page; page `i` of a head holds its tokens from `i * page_size`.
        scale: factor of the products of queries and keys.
        layer, shape, prompt_tokens, state: as in `LayerView`.
    """

    @property
    def layer(self) -> int: ...

    @property
    def shape(self) -> ModelShape: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def q(self) -> Tensor: ...

    @property
    def lengths(self) -> Tensor: ...

    @property
    def page_size(self) -> int: ...

    @property
    def scale(self) -> float: ...

    @property
    def state(self) -> dict[str, Any]: ...

    def summary(self, name: str) -> Tensor:
        """A declared summary of every full page, [kv_heads, pages, rows * width]. The last page is
        not among them while it is not full."""

    def top_pages(self, low: str, high: str, count: int) -> Tensor:
        """The last page of each head, and the `count` - 1 others that its queries could match best:
        those with the largest upper bound of the product of any of its query heads with a key,
        from summaries of the keys' smallest and largest elements. Of equal ones the first;
        ascending, int64 [kv_heads, count]. What a head with fewer pages has beyond its own are
        numbers of pages after its last."""

    def weights(
        self,
        *,
        channels: Tensor | None = None,
        divisors: Tensor | None = None,
        first: int = 0,
        last: int = 0,
    ) -> Tensor:
        """Softmax weights of the query over the cached tokens but the `first` first and the `last`
        last ones of each head, fp32 [q_heads, tokens], zero where a token has none.

        Args:
            channels: the only channels of queries and keys that scores are made of, int64
                [kv_heads, r]; None for all.
            divisors: what scores are divided by before the softmax, fp32 [q_heads]; None for 1.
            first, last: see above.
        """

    def top_tokens(self, values: Tensor, count: int, *, first: int = 0, last: int = 0) -> Tensor:
        """The `first` first tokens, the `last` last ones, and between them those of largest value,
        of equal ones the first: `count` in all, ascending, int64 [rows, count]. What a head with
        fewer tokens has beyond its own are indices after its last.

        Args:
            values: fp32 [rows, tokens]; a row per KV head, or one row for a layer whose heads hold
                the same tokens.
            count, first, last: see above; `first` comes before `last` where `count` is too small.
        """

    def mean_value(self) -> Tensor:
        """Mean of all values that were ever cached, fp32 [kv_heads, v_dim]. Needs `mean_value`."""


@dataclass(frozen=True)
class Selection:
    """What one decode step reads of one layer: either whole pages or single tokens.

    Attributes:
        pages: page numbers per head, ascending, int64 [kv_heads, n]; they must name the last page.
        tokens: token indices per head, ascending, int64 [kv_heads, n].
        rest: value that stands for everything that is not read, [kv_heads, v_dim], and
        rest_weight: its share of each query head's output, [q_heads]; None for nothing.
    """

    pages: Tensor | None = None
    tokens: Tensor | None = None
    rest: Tensor | None = None
    rest_weight: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """One run of some tokens through some layers.

    Attributes:
        tokens: which tokens of the request (prompt, then output), ascending, int64 [m].
        layers: which layers. Tokens of a pass that begins beyond layer 0 continue from the hidden
            state with which an earlier pass left them at that layer.
        positions: the positions they take, int64 [m]; None for their own indices.
        keep: whether their keys and values stay in the cache when the pass is over.
        observe: the attention weights of its last so many queries at its last layer are wanted.
        sees: which tokens its queries see beside the pass's own, ascending; None for all cached.
        deviation: how far the keys and values that the next layer would make of its tokens are from
            those that are cached there is wanted; for methods of the stage `reuse`.
    """

    tokens: Tensor
    layers: range
    positions: Tensor | None = None
    keep: bool = True
    observe: int = 0
    sees: Tensor | None = None
    deviation: bool = False


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back to the program that asked for it.

    Attributes:
        weights: with `observe`, softmax weights at its last layer, fp32 [q_heads, m, keys].
        keys: which token each of the keys is, int64 [keys], ascending.
        deviation: with `deviation`, of each token of the pass the L2 norm, over all heads, of its
            new keys and values at the layer after the pass less the cached ones, fp32 [m]; infinite
            for tokens that were not reused.
    """

    weights: Tensor | None
    keys: Tensor | None
    deviation: Tensor | None = None


@dataclass(frozen=True)
class DraftTree:
    """Proposed continuations of a request.

    Attributes:
        tokens: token ids, each parent before its children, int64 [n].
        parents: index of each token's parent, -1 for the request's last token, int64 [n].
    """

    tokens: Tensor
    parents: Tensor


@dataclass(frozen=True)
class Merged:
    """Tokens whose keys and values are others after a merge.

    Attributes:
        tokens: which, all of them kept, bool [kv_heads, tokens].
        k, v: what they are then, head after head, [m, k_dim] and [m, v_dim].
    """

    tokens: Tensor
    k: Tensor
    v: Tensor


def group_sum(weights: Tensor, kv_heads: int) -> Tensor:
    """Sum over the query heads that share a KV head: [q_heads, ...] to [kv_heads, ...]."""
    return weights.reshape(kv_heads, -1, *weights.shape[1:]).sum(1)


def top_mask(scores: Tensor, counts: Tensor | Sequence[int]) -> Tensor:
    """The `counts[h]` highest scores of each head; of equal ones the earlier.

    Args:
        scores: [heads, tokens]; -inf is never chosen.
        counts: int64 [heads].

    Returns:
        bool [heads, tokens].
    """
    n = scores.shape[1]
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    counts = torch.as_tensor(counts, device=scores.device).clamp(0, n)
    most, fewest = int(counts.max()), n - int(counts.min())
    if most <= fewest:  # look for the lowest that is chosen, or the highest that is not
        lowest = torch.nn.functional.pad(scores.topk(most).values, (1, 0), value=torch.inf)
        edge = lowest.gather(1, counts[:, None])
    else:
        highest = scores.topk(fewest, largest=False).values
        highest = torch.nn.functional.pad(highest, (1, 0), value=-torch.inf)
        edge = highest.gather(1, n - counts[:, None])
    above, level = scores > edge, scores == edge
    room = (counts - above.sum(1))[:, None]
    return (above | (level & (level.cumsum(1) <= room))) & (scores > -torch.inf)
