"""What a plan does to one sequence: observed while it runs, acted on between its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tamis.attention.observe import column_sums, decode_weights
from tamis.cache import Field, OutOfPages, PagedKV, SequenceCache
from tamis.engine import eviction, stores
from tamis.engine.program import Aside
from tamis.engine.trace import Trace
from tamis.engine.views import ATTENTION, LayerOptions
from tamis.methods.views import ModelShape, group_sum
from tamis.plan import Plan

T = TypeVar("T")

ShiftKeys = Callable[[int | range, Tensor, Tensor], Tensor]
"""Keys moved to other positions: `Model.shift_keys`."""


@dataclass
class LayerLife:
    """What is remembered about one layer of a sequence. Tensors are replaced, never changed in
    place, so that forks may share them.

    Attributes:
        state: the methods' own.
        options: how the layer attends, known from its first step on.
        queries: the last queries, [m, q_heads, k_dim].
        sums: attention that the last step's queries paid, [kv_heads, tokens], not yet counted.
        asked: a step's only query [1, q_heads, k_dim], its log-sum-exps and position, of which the
            attention has not been counted.
        values: sum of all values, fp32 [kv_heads, v_dim], and their number.
        similarity: sum of cosine similarities over tokens, and their number.
        dropped: sums of the keys and values that streaming heads dropped, and their number, fp32
            [kv_heads, k_dim], [kv_heads, v_dim] and [kv_heads].
        summarized: full pages of each head whose summaries are up to date; 0 for none of any.
        watched: the last queries of a pass that are observed, and their positions.
    """

    state: dict[str, Any] = field(default_factory=dict)
    options: LayerOptions | None = None
    queries: Tensor | None = None
    sums: Tensor | None = None
    asked: tuple[Tensor, Tensor, Tensor] | None = None
    values: tuple[Tensor | None, int] = (None, 0)
    similarity: tuple[float, int] = (0.0, 0)
    dropped: tuple[Tensor, Tensor, Tensor] | None = None
    summarized: list[int] | Literal[0] = 0
    watched: tuple[Tensor, Tensor] | None = None


@dataclass
class Owed:
    """What is left to do of what the end of a step asked for.

    Attributes:
        at_end: whether the prompt's last token has just been cached.
        late: whether an earlier step's eviction was never finished.
        evicted: layers whose eviction is done, from the first on.
    """

    at_end: bool
    late: bool = False
    evicted: int = 0


class Lifecycle:
    """A plan at work on one sequence.

    Attributes:
        plan, shape: what acts, on which model.
        cache: the sequence's pages.
        prompt_tokens: tokens of the prompt; what follows was generated.
        layers: one per layer.
        runs: consecutive layers of one shape, which are looked at together where that will do.
        query_positions: positions of the queries that are kept, the same in every layer.
        streaming: per layer the heads that keep first and recent tokens only, bool [kv_heads];
            None in plans without such heads.
        owed: what the last step asked for and found no pages for, to be done before the next one
            (`act`); None when nothing is.
        originals: by the first layer of a run, the positions [heads, m], padded with the largest
            integer, and keys [heads, m, k_dim] of its tokens that attend from elsewhere than where
            they were computed, as they were then.
        budgets: tokens per head that the plan's budget method has settled, int64 [layers, heads].
        position_shift: by how much tokens' positions lie below their numbers, once a program of
            passes has given the prompt new ones.
        aside: hidden states that wait, and which tokens each layer holds, in plans with programs.
        watch: the layer at which queries of the current pass are observed, and how many.
        sees: the tokens that the current pass's queries see beside its own; None for all.
        fresh: while a program computes tokens again, the first one that was not reused: all of them
            lie in the cache and are written where they lie. None otherwise.
        failure: what a method raised while a layer asked it; the request ends by it.
        trace: what is recorded for `LLM.inspect`; None when nobody asked.
    """

    def __init__(
        self,
        plan: Plan,
        shape: ModelShape,
        cache: SequenceCache,
        prompt_tokens: int,
        shift_keys: ShiftKeys,
        trace: Trace | None = None,
    ) -> None:
        """Begin the life of an empty cache.

        Raises:
            PlanError: a method has not been fitted for this model, or does not fit its sizes.
        """
        self.plan = plan
        self.shape = shape
        self.cache = cache
        self.prompt_tokens = prompt_tokens
        self.layers = [LayerLife() for _ in shape.layers]
        self.runs = _runs(shape)
        self.query_positions: list[int] = []
        self.streaming = plan.heads.streaming(shape) if plan.heads is not None else None
        self.originals: dict[int, tuple[Tensor, Tensor]] = {}
        self.budgets: Tensor | None = None
        self.position_shift = 0
        self.aside = Aside(shape.n_layers)
        self.watch: tuple[int, int] | None = None
        self.sees: Tensor | None = None
        self.fresh: int | None = None
        self.failure: Exception | None = None
        self.shift_keys = shift_keys
        self.trace = trace
        if trace is not None:
            trace.restart()
        self._done = 0  # tokens that have been settled
        self.owed: Owed | None = None
        stores.declare(self)

    @property
    def device(self) -> torch.device:
        return self.cache.cache.arena.data.device

    @property
    def generating(self) -> bool:
        """Whether the whole prompt is cached and settled."""
        return self._done >= self.prompt_tokens

    @property
    def direct(self) -> bool:
        """Whether a decode step reads all live pages and, beside encoded ones that attention can
        read as they are, nothing else."""
        selects = self.generating and self.plan.select is not None
        reads_all = self.sees is None and self.fresh is None
        return not selects and reads_all and not stores.held_apart(self)

    def begin_at(self, n_tokens: int, *, summarized: bool = True) -> None:
        """Count the tokens that the cache was given as settled; those in full pages may have their
        summaries."""
        self._done = n_tokens
        if not summarized:
            return
        for layer, shape in zip(self.layers, self.shape.layers, strict=True):
            if shape.window is None:
                layer.summarized = [n_tokens // self.cache.layout.page_size] * shape.kv_heads

    @property
    def listens(self) -> bool:
        """Whether anything of a step is noted (`observe`)."""
        needs = self.plan.needs
        noted = needs.mean_value or (needs.in_steps and self._weighs)
        return noted or self.watch is not None or self.trace is not None

    @property
    def _weighs(self) -> bool:
        """Whether an eviction is still to come that goes by queries and attention."""
        goes_on = self.plan.evict is not None and self.plan.evict.interval is not None
        return goes_on or not self.generating

    def fork(self, cache: SequenceCache) -> Lifecycle:
        """The same life for a fork of the sequence, with its `cache`."""
        other = object.__new__(Lifecycle)
        other.__dict__.update(self.__dict__)
        other.cache = cache
        other.layers = [replace(layer, state=dict(layer.state)) for layer in self.layers]
        other.query_positions = list(self.query_positions)
        other.originals = dict(self.originals)
        other.aside = self.aside.fork()
        if self.plan.needs.attention:  # counting it writes to every page
            self.owed = self.owed or Owed(at_end=False, evicted=self.shape.n_layers)
        other.owed = None if self.owed is None else replace(self.owed)
        other.trace = None
        return other

    def ask(self, question: Callable[[], T]) -> T | None:
        """What a method answers in the midst of a forward; None if it fails, which is noted, so
        that the other requests of the step go on."""
        try:
            return question()
        except Exception as error:
            self.failure = self.failure or error
            return None

    def observe(
        self,
        layer: int,
        q: Tensor,
        v: Tensor,
        lse: Tensor,
        pages: PagedKV,
        positions: Tensor,
    ) -> None:
        """Note what the methods need of one layer of a step.

        Args:
            layer: the layer; its options are known.
            q: [tokens, q_heads, k_dim]; v: [tokens, kv_heads, v_dim]; lse: [tokens, q_heads].
            pages: the layer's pages, one row, the step's own tokens among them.
            positions: of the step's tokens, [tokens].
        """
        needs, mine = self.plan.needs, self.layers[layer]
        if needs.queries and self._weighs:
            queries = q if mine.queries is None else torch.cat([mine.queries, q])
            mine.queries = queries[-needs.queries :].clone()
            if layer == 0:
                self.query_positions += positions.tolist()
                del self.query_positions[: -needs.queries]
        if needs.attention and self._weighs:
            if len(q) == 1:  # all layers' at once, when the step is over
                mine.asked = (q.clone(), lse.clone(), positions)
            else:
                mine.sums = self._attention_paid(mine.options, q, lse, pages, positions)
        if self.watch is not None and self.watch[0] == layer:
            before = mine.watched or (q[:0], positions[:0])
            queries, at = torch.cat([before[0], q]), torch.cat([before[1], positions])
            mine.watched = (queries[-self.watch[1] :].clone(), at[-self.watch[1] :].clone())
        if needs.mean_value:
            total, tokens = mine.values
            added = v.float().sum(0)
            mine.values = (added if total is None else total + added, tokens + len(v))

    def _attention_paid(
        self,
        options: LayerOptions | None,
        q: Tensor,
        lse: Tensor,
        pages: PagedKV,
        positions: Tensor,
    ) -> Tensor:
        """What a chunk's queries paid to each cached token, fp32 [kv_heads, tokens]."""
        assert options is not None
        weights = column_sums(
            q,
            pages,
            lse,
            decay=self.plan.needs.decay,
            scale=options.scale,
            positions=positions,
            window=options.window,
            softcap=options.softcap,
        )
        return group_sum(weights, pages.lengths.shape[1])

    def measure(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Note what a layer's attention did to the hidden states [tokens, hidden] of a step."""
        if not self.generating:
            total, tokens = self.layers[layer].similarity
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            self.layers[layer].similarity = (total + float(cosine.sum()), tokens + len(before))

    def pass_over(self, n_tokens: int) -> None:
        """Count tokens that a step has added; what is to be done is left for the next `settle`."""
        self._done += n_tokens

    def settle(self, n_tokens: int) -> None:
        """Act on what a step has added: `n_tokens` tokens, counted by the cache already, and the
        attention they paid (`count_attention`). What finds no free page is `owed`."""
        was_generating = self.generating
        self._done += n_tokens
        left = self.owed or Owed(at_end=False)
        self.owed = Owed(
            at_end=left.at_end or (self.generating and not was_generating),
            late=self.owed is not None and left.evicted < self.shape.n_layers,
        )
        with contextlib.suppress(OutOfPages):
            self.act()

    def act(self) -> None:
        """Do what is owed, if anything is.

        Raises:
            OutOfPages: too few pages are free; what was not done is still owed.
        """
        if self.owed is None:
            return
        if self.plan.needs.attention:
            self.cache.unshare()
        eviction.act(self, self.owed)
        stores.act(self, at_end=self.owed.at_end)
        self.owed = None

    @property
    def generated(self) -> int:
        """Generated tokens that are cached."""
        return max(0, self._done - self.prompt_tokens)

    def count_attention(self, n_tokens: int) -> None:
        """Add the last step's attention to the side column."""
        decay = self.plan.needs.decay**n_tokens
        for run in self.runs:
            asked = [i for i in run if self.layers[i].asked is not None]
            alike = len({self._products(i) for i in asked}) == 1 and len(asked) == len(run)
            for layers in [run] if alike else [range(i, i + 1) for i in asked]:
                self.cache.accumulate(layers, ATTENTION, self._paid(layers), decay)
            for i in run:
                sums = self.layers[i].sums
                if sums is not None:
                    self.cache.accumulate(i, ATTENTION, sums, decay)
                self.layers[i].sums = self.layers[i].asked = None

    def _products(self, layer: int) -> tuple[float, float | None]:
        """How a layer makes scores of queries and keys."""
        options = self.layers[layer].options
        assert options is not None
        return options.scale, options.softcap

    def _paid(self, layers: range) -> Tensor:
        """What a step's only query paid to each token of like layers, as they lie, fp32
        [layers * kv_heads, tokens]."""
        asked = [self.layers[i].asked for i in layers]
        options = self.layers[layers.start].options
        assert options is not None
        q, lse, positions = (torch.cat(parts) for parts in zip(*filter(None, asked), strict=True))
        pages = self.cache.unordered_pages(layers)
        weights = decode_weights(
            q,
            pages,
            lse,
            scale=options.scale,
            positions=None if options.window is None else positions,
            window=options.window,
            softcap=options.softcap,
        )
        return group_sum(weights.flatten(0, 1), pages.lengths.numel())

    def encoded_lengths(self, layer: int) -> Tensor:
        """Tokens of each head that lie in encoded pages, before its live ones, int64 [kv_heads]."""
        return stores.encoded_lengths(self, layer)

    def encoded_pages(self, layer: int) -> PagedKV | None:
        """The encoded pages of a layer, one row; None where there are none."""
        return stores.encoded_pages(self, layer)

    def summary(self, layer: int, name: str) -> Tensor:
        """A summary of every page that has one, [kv_heads, pages, width]."""
        return stores.summary(self, layer, name)


def columns(plan: Plan, shape: ModelShape) -> tuple[Field, ...]:
    """What the live pages of a sequence under `plan` hold beside keys, values and positions."""
    fields = []
    if plan.needs.attention:
        fields.append(Field(ATTENTION, torch.float32, 1))
    if plan.select is not None:
        summaries = plan.select.summaries(shape.layers[0].k_dim, shape.dtype)
        fields += [Field(c.name, c.dtype, c.width, c.rows) for c in summaries]
    return tuple(fields)


def _runs(shape: ModelShape) -> list[range]:
    """Consecutive layers of one shape."""
    ends = [i for i in range(1, shape.n_layers) if shape.layers[i] != shape.layers[i - 1]]
    return [range(*span) for span in pairwise([0, *ends, shape.n_layers])]
