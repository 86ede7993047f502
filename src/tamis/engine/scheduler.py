"""Which work goes into the next step.

Running sequences that decode come first, one token each, so no long prompt ever stalls them; what
is left of the token budget goes to chunks of prompts, as much as the pace allows. Who goes first
is the order's to say. Pages are reserved here, before the step, so the step itself cannot run out
of memory. When pages are short, those go first that are only kept for later requests; then the last
sequence in order gives its pages up: it is swapped to host memory, or forgotten and recomputed
later.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from tamis.cache import OutOfPages, OutOfSwap, PagedCache
from tamis.engine import blend
from tamis.engine.lifecycle import Lifecycle, ShiftKeys, columns
from tamis.engine.memory import prompt_bytes
from tamis.engine.order import Order
from tamis.engine.pace import Costs, Pace
from tamis.engine.prefix import PrefixReuse
from tamis.engine.program import Passes, Program
from tamis.engine.sequence import Sequence, Status
from tamis.methods.base import Draft
from tamis.methods.views import ModelShape

Preemption = Literal["recompute", "swap"]


class Work(NamedTuple):
    """`n_tokens` pending tokens of one sequence, for which pages are reserved."""

    sequence: Sequence
    n_tokens: int


class Scheduler:
    """Chooses each step's work, under a token budget and a page budget.

    Args:
        cache: where pages are reserved.
        max_batch_tokens: tokens of one step, decodes and chunks together.
        max_running: sequences that may hold pages at once.
        preemption: what becomes of the pages of a preempted sequence.
        shape: the model's, for plans.
        shift_keys: moves keys to other positions, for plans that do.
        order: who goes first.
        pace: how many prompt tokens join a step in which other sequences decode.
        prefixes: what sequences may begin with.

    Attributes:
        costs: what steps have cost, for the pace; the engine tells it.
    """

    def __init__(
        self,
        cache: PagedCache,
        max_batch_tokens: int,
        max_running: int,
        preemption: Preemption,
        shape: ModelShape,
        shift_keys: ShiftKeys,
        order: Order,
        pace: Pace,
        prefixes: PrefixReuse,
    ) -> None:
        self.cache = cache
        self.prefixes = prefixes
        self.order = order
        self.pace = pace
        self.costs = Costs()
        self.shape = shape
        self.shift_keys = shift_keys
        self._learned: dict[Draft, Any] = {}
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_running, max_batch_tokens)
        self.preemption = preemption
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """True when no sequence waits, runs or lies swapped."""
        return not (self.waiting or self.running or self.swapped)

    def add(self, sequence: Sequence) -> None:
        """Take a new sequence into the queue."""
        self.order.arrived(sequence, [*self.waiting, *self.running, *self.swapped])
        self._enqueue(sequence)

    def add_forks(self, sequences: Iterable[Sequence]) -> None:
        """Take siblings that already hold (shared) pages among the running sequences."""
        for sequence in sequences:
            self.prefixes.share(sequence)
            self._start(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended and free its pages at once, wherever they lie."""
        for queue in (self.running, self.waiting, self.swapped):
            if sequence in queue:
                queue.remove(sequence)
        sequence.status = Status.FINISHED
        self._free(sequence)

    def restart(self, sequence: Sequence) -> None:
        """Free the pages of a running sequence; its tokens are computed again from the first."""
        self.running.remove(sequence)
        self._forget(sequence)

    def schedule(self) -> tuple[list[Work], list[Sequence]]:
        """Choose the next step's work and reserve its pages.

        Returns:
            The work, sequences that run one token first, and among them those that read all live
            pages and nothing else; and the sequences that cannot go on
            even with the cache to themselves, which the caller must end.
        """
        self.cache.arrive()
        batch: dict[Sequence, int] = {}
        stuck: list[Sequence] = []
        for queue in (self.running, self.waiting, self.swapped):
            queue.sort(key=self.order.key)
        self._complete(batch, stuck)
        budget = self.max_batch_tokens
        n_running = len(self.running)
        decodes = [s for s in self.running if s.n_ready == 1]
        prefills = [s for s in self.running if s.n_ready > 1]
        for sequence in decodes:
            if sequence.status is Status.RUNNING:
                budget -= self._reserve(sequence, budget, batch, stuck)
        if budget > 0:
            budget = self.pace.prompt_tokens(self.costs, len(batch), budget)
        for sequence in prefills:
            if sequence.status is Status.RUNNING:
                budget -= self._reserve(sequence, budget, batch, stuck)
        if len(self.running) == n_running and not stuck:  # nobody was preempted: there is room
            self._let_in(budget, batch, stuck)
            if not batch:  # all others gave way to those whose pages were to come beside the step
                self.cache.arrive()
                for sequence in list(self.running):
                    budget -= self._reserve(sequence, budget, batch, stuck)
        work = [Work(sequence, n) for sequence, n in batch.items()]
        work.sort(key=lambda item: (item.n_tokens > 1, not item.sequence.direct))
        return work, stuck

    def _complete(self, batch: dict[Sequence, int], stuck: list[Sequence]) -> None:
        """Have the plans of sequences of which everything has run do what they still owe."""
        for sequence in [s for s in self.running if s.n_ready == 0]:
            if self._settled(sequence, batch) and not sequence.settled:
                stuck.append(sequence)

    def _let_in(self, budget: int, batch: dict[Sequence, int], stuck: list[Sequence]) -> None:
        """Resume swapped sequences and start waiting ones, in order, while there is room for the
        first of them with its whole prompt. Those whose prompts begin with what another is
        computing are passed over until it is there. Where pages can come back while the model
        runs, a resumed sequence goes on with the next step, if there is other work for this one."""
        while budget > 0:
            ready = (s for s in self.waiting if not self.prefixes.awaited(s, self.running))
            heads = [*self.swapped[:1], *itertools.islice(ready, 1)]
            if not heads:
                return
            sequence = min(heads, key=self.order.key)
            if sequence.status is Status.WAITING:
                self.prefixes.begin(sequence)
            while not self._may_start(sequence):
                last = max(self.running, key=self.order.key)
                if not self.order.outranks(sequence, last):
                    if sequence.status is Status.WAITING:
                        self._free(sequence)
                    return
                self._preempt(last)
                budget += batch.pop(last, 0)
            beside = False
            if sequence.status is Status.SWAPPED:
                beside = bool(batch) and self.cache.transfers is not None
                if not self._swapped_in(sequence, beside=beside):
                    return
                self.swapped.remove(sequence)
            else:
                if not self._assembled(sequence):
                    self._free(sequence)
                    if not self.running:
                        stuck.append(sequence)
                    return
                self.waiting.remove(sequence)
                self._open(sequence)
            self._start(sequence)
            if not beside:
                budget -= self._reserve(sequence, budget, batch, stuck)

    def _assembled(self, sequence: Sequence) -> bool:
        """Join the contexts that a sequence begins with, if its plan does; False if there is no
        room, and nothing was copied unless it is alone."""
        request, cache = sequence.request, sequence.cache
        assert cache is not None
        if not request.reused:
            return True
        again = self._passes(sequence) is not None
        following = sequence.n_prompt - request.n_given if again else 0
        while True:
            try:
                if self.running:  # else it is now or never
                    blend.reserve(cache, request.reused, following)
                blend.assemble(cache, request.reused, self.shift_keys, following)
            except OutOfPages:
                if not self.prefixes.make_room():
                    return False
            else:
                return True

    def _passes(self, sequence: Sequence) -> Passes | None:
        """The program of a sequence's prompt under its plan; None for ordinary chunks."""
        plan, reused = sequence.request.plan, sequence.request.reused
        if plan.tokens is not None:
            return plan.tokens.program(sequence.n_prompt, self.shape)
        if plan.reuse is not None and reused:
            lengths = [len(context.tokens) for context in reused]
            return plan.reuse.program(lengths, sequence.n_prompt, self.shape)
        return None

    def _swapped_in(self, sequence: Sequence, *, beside: bool) -> bool:
        """Bring the pages of a swapped sequence back, `beside` what the device does for others;
        False if there is no room."""
        assert sequence.cache is not None
        while True:
            try:
                sequence.cache.swap_in(beside=beside)
            except OutOfPages:
                if not self.prefixes.make_room():
                    return False
            else:
                return True

    def _may_start(self, sequence: Sequence) -> bool:
        """Whether a sequence, with the branches that it will have, can run beside the others."""
        fresh = sequence.status is Status.WAITING and sequence.n_output == 0
        n_branches = sequence.request.params.n if fresh else 1
        full = self.running and len(self.running) + n_branches > self.max_running
        return not full and self._has_room(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether its pages, all that running prompts still need, and one more page for every
        head of every running sequence are free or can be given up; always true when nothing else
        runs."""
        if not self.running:
            return True
        promised = 0
        for other in self.running:
            assert other.cache is not None
            promised += max(0, self._needs(other) - other.cache.bytes)
        headroom = (len(self.running) + 1) * self.cache.layout.bytes_for(1)
        needed = self._needs(sequence)
        if sequence.status is Status.WAITING:
            needed -= self.prefixes.spared(sequence)
        return self.prefixes.has_room(needed + promised + headroom)

    def _needs(self, sequence: Sequence) -> int:
        """Bytes that a sequence takes until its prompt is computed, or has and will keep."""
        plan, cache, context = sequence.request.plan, sequence.cache, sequence.request.context
        if context is not None:
            layout, _ = self.cache.rows_with(columns(plan, self.shape))
            return context.bytes + layout.bytes_for(len(sequence.tokens) - len(context.tokens))
        if plan.dense:
            return self.cache.layout.bytes_for(len(sequence.tokens))
        if cache is not None and not sequence.in_prompt:
            return cache.bytes
        return prompt_bytes(self.cache, self.shape, plan, sequence.n_prompt, self.max_batch_tokens)

    def _open(self, sequence: Sequence) -> None:
        """Count what a sequence begins with and, under a plan or a trace, give it its life and
        program."""
        plan = sequence.request.plan
        assert sequence.cache is not None
        self.prefixes.count(sequence)
        context = sequence.request.context
        if context is not None and context.life is not None:
            sequence.life = context.life.fork(sequence.cache)
            return
        if plan.dense and sequence.request.trace is None:
            return
        sequence.life = Lifecycle(
            plan,
            self.shape,
            sequence.cache,
            sequence.n_prompt,
            self.shift_keys,
            sequence.request.trace,
        )
        given = sequence.request.n_given if sequence.request.reused else 0
        sequence.life.begin_at(sequence.n_computed, summarized=not given)
        passes = self._passes(sequence)
        if passes is not None:
            sequence.life.fresh = given or None
            sequence.program = Program(passes, sequence.life, self.shape.n_layers)

    def _reserve(
        self, sequence: Sequence, budget: int, batch: dict[Sequence, int], stuck: list[Sequence]
    ) -> int:
        """Put up to `budget` pending tokens of a running sequence into the batch, preempting later
        sequences for their pages; the number of tokens. A sequence that is itself the last
        keeps its pages and waits a step."""
        assert sequence.cache is not None
        if not self._settled(sequence, batch):
            return 0
        n = min(budget, sequence.n_ready, sequence.max_chunk)
        n = self._with_draft(sequence, n, budget)
        while n > 0:
            try:
                sequence.cache.reserve(0 if sequence.in_place else n, sequence.layers)
            except OutOfPages:
                if sequence.draft is not None:
                    sequence.draft, n = None, 1  # a guess is worth nobody's pages
                elif self.prefixes.make_room() or self._preempt_last(sequence, batch):
                    continue
                elif len(self.running) > 1:
                    return 0
                elif n > 1:
                    n //= 2
                else:
                    stuck.append(sequence)
                    return 0
            else:
                batch[sequence] = n
                return n
        return 0

    def _settled(self, sequence: Sequence, batch: dict[Sequence, int]) -> bool:
        """Whether a sequence can go on: its plan has done all that the last step asked for, later
        sequences being preempted for the pages it took, so that its tokens do not depend on who
        else is there. Alone, and still without pages, it goes on as it is."""
        while sequence.life is not None and sequence.life.owed is not None:
            try:
                sequence.life.act()
            except OutOfPages:
                if not self.prefixes.make_room() and not self._preempt_last(sequence, batch):
                    return len(self.running) == 1
        return True

    def _preempt_last(self, sequence: Sequence, batch: dict[Sequence, int]) -> bool:
        """Take the pages of the last running sequence; False if that is `sequence` itself."""
        last = max(self.running, key=self.order.key)
        if last is sequence:
            return False
        self._preempt(last)
        batch.pop(last, None)
        return True

    def _with_draft(self, sequence: Sequence, n: int, budget: int) -> int:
        """Tokens of the step with those that the sequence's plan proposes, where there is room."""
        sequence.draft = None
        draft = sequence.request.plan.draft
        if draft is None or n != 1 or sequence.in_prompt or sequence.n_pending != 1:
            return n
        tree = draft.propose(self.learned(draft), sequence.tokens[-1])
        if not len(tree.tokens) or 1 + len(tree.tokens) > budget:
            return n
        sequence.draft = tree
        return 1 + len(tree.tokens)

    def learned(self, draft: Draft) -> Any:
        """What a drafting method has learned so far, from all requests with the same one."""
        if draft not in self._learned:
            self._learned[draft] = draft.start(self.shape.vocab_size)
        return self._learned[draft]

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.cache is not None
        self.running.remove(sequence)
        sequence.request.preemptions += 1
        if self.preemption == "swap" and self._swapped_out(sequence):
            self.prefixes.leave(sequence)
            sequence.status = Status.SWAPPED
            insort(self.swapped, sequence, key=self.order.key)
        else:
            self._forget(sequence)

    def _swapped_out(self, sequence: Sequence) -> bool:
        """Move a sequence's pages to host memory, before those that are only kept for later
        requests; False if there is no room."""
        assert sequence.cache is not None
        while True:
            try:
                sequence.cache.swap_out()
            except OutOfSwap as error:
                if not self.prefixes.tree.forget_copies(error.missing):
                    return False
            else:
                return True

    def _forget(self, sequence: Sequence) -> None:
        self._free(sequence)
        sequence.n_computed = 0
        self._enqueue(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Give a sequence's pages back, if it has any, and all that goes with them."""
        self.prefixes.leave(sequence)
        if sequence.cache is not None:
            sequence.cache.free()
            sequence.cache = sequence.life = sequence.program = sequence.draft = None

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=self.order.key)

    def _start(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=self.order.key)
