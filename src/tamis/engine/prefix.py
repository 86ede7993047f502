"""Which sequences may begin with pages that earlier ones computed, and which leave theirs."""

from __future__ import annotations

from collections.abc import Iterable

from tamis.cache import Block, Field, PagedCache, PrefixTree
from tamis.engine.context import Context, asks_at_once
from tamis.engine.lifecycle import columns
from tamis.engine.sequence import Sequence
from tamis.methods.views import ModelShape
from tamis.plan import Plan

_AT_ONCE = 8
"""Blocks that are given up before it is tried again whether there is room."""


class PrefixReuse:
    """Automatic reuse of prefixes, exactly: only pages that a sequence would have computed itself.

    The pages of a prompt are so until its end under plans that attend to all of it and gather
    nothing on the way (`exact_prompt`), whatever they do with them afterwards; those of generated
    tokens under exact attention, with or without drafts. So all of these plans share one tree,
    but for those with side columns, which have trees of their own.

    Attributes:
        tree: the pages.
        enabled: whether anything is reused.
        lookups, hits: sequences that were started, and those that began with something, be it a
            context.
        looked_up_tokens, hit_tokens: their tokens, and those that they began with.
    """

    def __init__(self, cache: PagedCache, shape: ModelShape, enabled: bool) -> None:
        self.tree = PrefixTree(cache)
        self.enabled = enabled
        self.lookups = self.hits = self.looked_up_tokens = self.hit_tokens = 0
        self._cache = cache
        self._shape = shape
        self._page_size = cache.layout.page_size

    # --- a sequence's way -----------------------------------------------------------------------

    def awaited(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether one of the running sequences is about to compute a page that a waiting one will
        begin with."""
        n_most, size = self._most(sequence), self._page_size
        if n_most < size:
            return False
        for other in running:
            end = (other.n_computed // size + 1) * size  # of the page that comes next
            if (
                end <= min(n_most, other.n_prompt)
                and other.tokens[:size] == sequence.tokens[:size]
                and other.tokens[:end] == sequence.tokens[:end]
                and self._notes(other)
                and self._columns(other) == self._columns(sequence)
            ):
                return True
        return False

    def found(self, sequence: Sequence) -> int:
        """Tokens whose pages there are for a waiting sequence now."""
        n_most, of_context = self._most(sequence), sequence.request.n_given
        if n_most < self._page_size:
            return of_context
        block = self.tree.match(sequence.tokens, n_most, self._columns(sequence))
        return max(of_context, 0 if block is None else block.depth * self._page_size)

    def begin(self, sequence: Sequence) -> None:
        """Give a waiting sequence a cache, with the longest prefix that there is for it: the pages
        of others, or of the context that it goes on from."""
        n_most, context = self._most(sequence), sequence.request.begins_with
        if n_most >= self._page_size:
            sequence.prefix = self._fetched(sequence, n_most)
        found = 0 if sequence.prefix is None else sequence.prefix.depth * self._page_size
        if context is not None and found < len(context.tokens) and self._shares(sequence, context):
            assert context.cache is not None
            sequence.cache, sequence.prefix = context.cache.fork(), context.prefix
            self.share(sequence)
        elif sequence.prefix is None:
            sequence.cache = self._cache.new_sequence(self._columns(sequence))
        else:
            sequence.cache = self.tree.begin(sequence.prefix)

    def spared(self, sequence: Sequence) -> int:
        """Bytes that a sequence which is about to start need not find, because it shares them."""
        plan, settled = sequence.request.plan, sequence.request.context is not None
        changes = not asks_at_once(plan) if settled else plan.compresses
        if sequence.cache is None or changes:
            return 0  # what changes pages copies them first
        return sequence.cache.bytes

    def count(self, sequence: Sequence) -> None:
        """Note with how much a sequence starts."""
        assert sequence.cache is not None
        n_tokens = (
            sequence.request.n_given if sequence.request.reused else sequence.cache.next_position
        )
        sequence.n_computed = n_tokens
        if sequence.prefix is not None:
            self.tree.count_hit(sequence.prefix)
        self.lookups += 1
        self.looked_up_tokens += len(sequence.tokens)
        self.hits += n_tokens > 0
        self.hit_tokens += n_tokens
        if sequence.request.started_s is None:
            sequence.request.cached_tokens = n_tokens

    def note_computed(self, sequence: Sequence) -> None:
        """Take in the pages that a step has filled, before any of them falls out of a window or is
        changed by the sequence's plan."""
        if not self._columns(sequence):
            self._note(sequence)

    def note_settled(self, sequence: Sequence) -> None:
        """Take in the pages that a step has filled, once they have their summaries."""
        settled = sequence.life is not None and sequence.life.owed is None
        if settled and self._columns(sequence) and not sequence.request.plan.compresses:
            self._note(sequence)

    def share(self, sequence: Sequence) -> None:
        """Count a new fork of a sequence among those that use its prefix."""
        if sequence.prefix is not None:
            self.tree.use(sequence.prefix)

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence will not start now, or holds its pages no more."""
        if sequence.prefix is not None:
            self.tree.leave(sequence.prefix)
            sequence.prefix = None

    # --- room -----------------------------------------------------------------------------------

    def has_room(self, n_bytes: int) -> bool:
        """Whether so many bytes are free or could be made so."""
        if n_bytes <= self._cache.free_bytes + self.tree.idle_bytes:
            return True
        return self.tree.evict_windows() and self.has_room(n_bytes)

    def make_room(self) -> bool:
        """Give some pages up; False if there are none to give up."""
        return self.tree.evict(_AT_ONCE) > 0 or self.tree.evict_windows()

    # --- helpers --------------------------------------------------------------------------------

    def _fetched(self, sequence: Sequence, n_most: int) -> Block | None:
        """The longest prefix of a sequence for which there is room on the device."""
        side = self._columns(sequence)
        found = self.tree.match(sequence.tokens, n_most, side)
        if found is None or self.tree.fetch(found):
            return found
        return self.tree.match(sequence.tokens, n_most, side, resident=True)

    def _note(self, sequence: Sequence) -> None:
        if not self._notes(sequence):
            return
        plan, cache = sequence.request.plan, sequence.cache
        assert cache is not None
        if sequence.n_computed <= sequence.n_prompt or exact_output(plan):
            sequence.prefix = self.tree.extend(sequence.prefix, sequence.tokens, cache)
        if sequence.n_computed >= sequence.n_prompt and plan.compresses:
            self.leave(sequence)  # from here on its pages are its own

    def _notes(self, sequence: Sequence) -> bool:
        """Whether a sequence leaves anything behind."""
        request = sequence.request
        goes_on = request.context is None or request.plan.dense
        return self.enabled and goes_on and exact_prompt(request.plan)

    def _most(self, sequence: Sequence) -> int:
        """The most tokens that a sequence may begin with: what must be seen to run is left."""
        request = sequence.request
        watched = request.trace is not None or request.params.prompt_logprobs is not None
        if watched or not self._notes(sequence):
            return 0
        if request.plan.dense:
            return len(sequence.tokens) - 1
        return sequence.n_prompt - max(1, request.plan.needs.queries)

    def _shares(self, sequence: Sequence, context: Context) -> bool:
        """Whether a sequence's pages are of a context's formats."""
        assert context.cache is not None
        return context.cache.layout.columns == self._columns(sequence)

    def _columns(self, sequence: Sequence) -> tuple[Field, ...]:
        return columns(sequence.request.plan, self._shape)


def exact_prompt(plan: Plan) -> bool:
    """Whether the pages of a prompt are those of exact attention until its end, and nothing is
    gathered from its tokens but the last queries."""
    needs = plan.needs
    gathers = needs.attention or needs.similarity or needs.mean_value
    changes = (
        plan.reuse is not None
        or plan.prefill is not None
        or plan.tokens is not None
        or plan.place is not None
        or (plan.heads is not None and plan.heads.during_prefill)
        or (plan.evict is not None and plan.evict.per_chunk)
    )
    return not gathers and not changes


def exact_output(plan: Plan) -> bool:
    """Whether the pages of generated tokens are those of exact attention too."""
    return exact_prompt(plan) and not plan.compresses and plan.select is None
