"""Random sequences of operations on the cache against lists of (token number, position)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tamis.cache import CacheLayout, LayerShape, OutOfPages, OutOfSwap, PagedCache, SequenceCache
from tests.cache import tokens

LAYERS = (
    LayerShape(2, k_dim=8, v_dim=8),
    LayerShape(1, k_dim=4, v_dim=6, window=6),
    LayerShape(2, k_dim=8, v_dim=8, window=11),
)


@dataclass
class Model:
    """What a sequence ought to hold: per row the (token number, position) of each token."""

    rows: list[list[tuple[int, int]]]
    next_position: int = 0

    def copy(self) -> Model:
        return Model([list(row) for row in self.rows], self.next_position)


class CacheMachine(RuleBasedStateMachine):
    """Drives up to four sequences of one small cache."""

    @initialize(
        page_size=st.sampled_from([4, 8]),
        capacity=st.sampled_from([16_000, 40_000, 120_000]),
        swap_bytes=st.sampled_from([0, 12_000, 100_000]),
    )
    def start(self, page_size: int, capacity: int, swap_bytes: int) -> None:
        self.layout = CacheLayout(LAYERS, page_size, torch.float32)
        self.cache = PagedCache(self.layout, capacity, swap_bytes=swap_bytes)
        self.live: list[tuple[SequenceCache, Model]] = []
        self.serial = 0
        self.peak = 0

    # What a scheduler and a method may do.

    @precondition(lambda self: len(self.live) < 4)
    @rule()
    def new(self) -> None:
        self.live.append(
            (self.cache.new_sequence(), Model([[] for _ in range(self.layout.n_rows)]))
        )

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), trim=st.booleans())
    def append(self, data: st.DataObject, trim: bool) -> None:
        batch = data.draw(st.lists(st.sampled_from(self.resident()), min_size=1, unique_by=id))
        self.extend(data, batch, trim)

    def extend(
        self, data: st.DataObject, batch: list[tuple[SequenceCache, Model]], trim: bool
    ) -> None:
        reserved, serials = [], []
        for sequence, model in batch:
            n = data.draw(st.integers(1, 13))
            if self.fits_or_leaves_all_unchanged(sequence, n):
                reserved.append((sequence, model))
                serials.append(list(range(self.serial, self.serial + n)))
                self.serial += n
        if not reserved:
            return
        self.note_peak()
        tokens.append(self.cache, [sequence for sequence, _ in reserved], serials)
        for (sequence, model), new in zip(reserved, serials, strict=True):
            positions = range(model.next_position, model.next_position + len(new))
            for row in model.rows:
                row.extend(zip(new, positions, strict=True))
            model.next_position += len(new)
            if trim:
                sequence.trim()
                self.trim(model)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), n=st.integers(1, 13))
    def reserve_only(self, data: st.DataObject, n: int) -> None:
        sequence, _ = data.draw(st.sampled_from(self.resident()))
        self.fits_or_leaves_all_unchanged(sequence, n)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), layer=st.integers(0, len(LAYERS) - 1))
    def keep(self, data: st.DataObject, layer: int) -> None:
        sequence, model = data.draw(st.sampled_from(self.resident()))
        rows = model.rows[self.layout.rows(layer)]
        kept = [data.draw(self.subset(len(row))) for row in rows]
        before = self.state()
        try:
            sequence.keep(layer, [np.array(head, dtype=np.int64) for head in kept])
        except OutOfPages:
            assert self.state() == before
            return
        for row, head in zip(rows, kept, strict=True):
            row[:] = [row[i] for i in head]

    @precondition(lambda self: self.resident() and len(self.live) < 4)
    @rule(data=st.data(), grow=st.booleans())
    def fork(self, data: st.DataObject, grow: bool) -> None:
        sequence, model = data.draw(st.sampled_from(self.resident()))
        in_use = self.cache.bytes_in_use
        self.live.append((sequence.fork(), model.copy()))
        assert self.cache.bytes_in_use == in_use
        if grow:
            self.extend(data, [(sequence, model), self.live[-1]], trim=False)

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        sequence, _ = data.draw(st.sampled_from(self.resident()))
        before = self.state()
        try:
            sequence.swap_out()
        except OutOfSwap:
            assert self.state() == before
            assert self.cache.swap_bytes_in_use + self.held(sequence) > self.cache.swap_bytes

    @precondition(lambda self: any(sequence.swapped for sequence, _ in self.live))
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        swapped = [sequence for sequence, _ in self.live if sequence.swapped]
        sequence = data.draw(st.sampled_from(swapped))
        before = self.state()
        try:
            sequence.swap_in()
        except OutOfPages:
            assert self.state() == before
            assert not self.room_for(self.layout.count(sequence.page_counts))

    @precondition(lambda self: len(self.live) > 2)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        sequence.free()
        sequence.free()

    # What must be true after each of them.

    @invariant()
    def contents_equal_the_model(self) -> None:
        for sequence, model in self.resident():
            assert sequence.next_position == model.next_position
            for i, layer in enumerate(LAYERS):
                for head, row in enumerate(range(*self.layout.rows(i).indices(99))):
                    serials = [serial for serial, _ in model.rows[row]]
                    positions = [position for _, position in model.rows[row]]
                    assert sequence.lengths[row] == len(serials)
                    assert sequence.positions(i, head).tolist() == positions
                    k = sequence.contents(i, head, "k")
                    v = sequence.contents(i, head, "v")
                    assert torch.equal(k, tokens.keys(serials, row, layer.k_dim))
                    assert torch.equal(v, tokens.values(serials, row, layer.v_dim))

    @invariant()
    def references_and_bytes_equal_the_tables(self) -> None:
        in_use = 0
        for pool, references in zip(self.cache.pools, self.references(), strict=True):
            ids = np.array(list(references), dtype=np.int32)
            assert pool.references(ids).tolist() == list(references.values())
            assert pool.bytes_in_use == len(references) * pool.page_bytes
            in_use += pool.bytes_in_use
        assert self.cache.bytes_in_use == in_use
        assert self.cache.free_bytes == self.cache.capacity_bytes - in_use
        assert self.cache.swap_bytes_in_use == sum(
            self.held(sequence) for sequence, _ in self.live if sequence.swapped
        )

    @invariant()
    def the_peak_is_the_most_that_was_in_use(self) -> None:
        self.note_peak()
        assert self.peak <= self.cache.bytes_peak <= self.cache.capacity_bytes

    def teardown(self) -> None:
        for sequence, _ in self.live:
            sequence.free()
        assert self.cache.bytes_in_use == 0
        assert self.cache.swap_bytes_in_use == 0
        for pool in self.cache.pools:
            assert pool.free_pages == self.cache.arena.n_blocks * pool.pages_per_block

    # The naive model.

    def resident(self) -> list[tuple[SequenceCache, Model]]:
        return [(sequence, model) for sequence, model in self.live if not sequence.swapped]

    def subset(self, length: int) -> st.SearchStrategy[list[int]]:
        if length == 0:
            return st.just([])
        return st.one_of(
            st.sets(st.integers(0, length - 1)).map(sorted),
            st.integers(0, length).map(lambda n: list(range(n))),
            st.integers(0, length).map(lambda n: list(range(n, length))),
            st.just(list(range(0, length, 2))),
        )

    def trim(self, model: Model) -> None:
        page_size = self.layout.page_size
        for i, layer in enumerate(LAYERS):
            for row in model.rows[self.layout.rows(i)] if layer.window else []:
                # The newest token that the next query cannot see, if none was evicted.
                hidden = max(0, len(row) - layer.window + 1)
                del row[: hidden // page_size * page_size]

    def fits_or_leaves_all_unchanged(self, sequence: SequenceCache, n: int) -> bool:
        needed = sequence.pages_needed(n)
        before = self.state()
        in_use = self.cache.bytes_in_use
        try:
            sequence.reserve(n)
        except OutOfPages:
            assert self.state() == before
            assert not self.room_for(needed)
            return False
        assert self.cache.bytes_in_use == in_use + self.layout.bytes_of(needed)
        assert sequence.pages_needed(n).tolist() == [0] * len(needed)
        return True

    def references(self) -> list[Counter[int]]:
        """How often each page of each format stands in the tables."""
        counts: list[Counter[int]] = [Counter() for _ in self.cache.pools]
        for sequence, _ in self.resident():
            for row, format in enumerate(self.layout.row_formats):
                counts[format].update(sequence.tables[row, : sequence.page_counts[row]].tolist())
        return counts

    def room_for(self, pages: np.ndarray) -> bool:
        """Whether so many pages of each format fit beside those in use, block by block."""
        arena = self.cache.arena
        blocks_left = arena.n_blocks
        for pool, references, n in zip(self.cache.pools, self.references(), pages, strict=True):
            held = {id * 64 // arena.block_bytes for id in references}
            free_in_held = len(held) * pool.pages_per_block - len(references)
            more = max(0, int(n) - free_in_held)
            blocks_left -= len(held) + -(-more // pool.pages_per_block)
        return blocks_left >= 0

    def held(self, sequence: SequenceCache) -> int:
        """Bytes of the pages that hold a sequence's tokens."""
        pages = -(-sequence.lengths // self.layout.page_size)
        return self.layout.bytes_of(self.layout.count(pages))

    def state(self) -> list[object]:
        """Everything that a failed operation must leave as it was."""
        sequences = [
            (
                sequence.lengths.tolist(),
                [
                    sequence.tables[row, :n].tolist()
                    for row, n in enumerate(sequence.page_counts.tolist())
                ],
                sequence.swapped,
                sequence.next_position,
            )
            for sequence, _ in self.live
        ]
        return [sequences, self.cache.bytes_in_use, self.cache.swap_bytes_in_use]

    def note_peak(self) -> None:
        self.peak = max(self.peak, self.cache.bytes_in_use)


class TestCacheMachine(CacheMachine.TestCase):
    settings = settings(
        max_examples=30,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.slow
class TestCacheMachineAtLength(CacheMachine.TestCase):
    settings = settings(TestCacheMachine.settings, max_examples=100, stateful_step_count=50)
