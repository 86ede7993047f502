"""Random sequences of operations on the cache against lists of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tamis.cache import (
    CacheLayout,
    Field,
    LayerShape,
    OutOfPages,
    OutOfSwap,
    PagedCache,
    PageFormat,
    SequenceCache,
    Tier,
)
from tamis.cache.tables import PageTables
from tests.cache import links, tokens

LAYERS = (
    LayerShape(2, k_dim=8, v_dim=8),
    LayerShape(1, k_dim=4, v_dim=6, window=6),
    LayerShape(2, k_dim=8, v_dim=8, window=11),
)
COLUMNS = (Field("score", torch.float32, 1), Field("bound", torch.float32, 2, rows=1))
STORED = PageFormat.dense(8, 8, 8, torch.float32)
STORES = {"host": "host", "device": "device"}  # name: tier
STORE_LAYERS = (0, 2)  # of the same shape, so that they may share pages


class Token(NamedTuple):
    """What a row holds of a token: where its key and value came from, and its own data."""

    k: int
    v: int
    position: int
    score: int = 0


@dataclass
class Put:
    """Tokens in a store, and the layers that still hold them."""

    layers: set[int]
    serials: list[int]

    @property
    def n_pages(self) -> int:
        return 2 * -(-len(self.serials) // STORED.page_size) if self.layers else 0


@dataclass
class Model:
    """What a sequence ought to hold: per row its tokens, per store the puts."""

    rows: list[list[Token]]
    columns: tuple[Field, ...] = ()
    next_position: int = 0
    stores: dict[str, list[Put]] = field(default_factory=lambda: {name: [] for name in STORES})

    def copy(self) -> Model:
        return Model(
            [list(row) for row in self.rows],
            self.columns,
            self.next_position,
            {name: [Put(set(p.layers), p.serials) for p in s] for name, s in self.stores.items()},
        )

    def store_bytes(self, name: str) -> int:
        return sum(put.n_pages for put in self.stores[name]) * STORED.page_bytes


Pair = tuple[SequenceCache, Model]


class CacheMachine(RuleBasedStateMachine):
    """Drives up to four sequences of one small cache."""

    @initialize(
        page_size=st.sampled_from([4, 8]),
        capacity=st.sampled_from([20_000, 40_000, 120_000]),
        swap_bytes=st.sampled_from([0, 12_000, 100_000]),
        host_bytes=st.sampled_from([20_000, 60_000]),
    )
    def start(self, page_size: int, capacity: int, swap_bytes: int, host_bytes: int) -> None:
        self.layout = CacheLayout(LAYERS, page_size, torch.float32)
        self.cache = PagedCache(self.layout, capacity, swap_bytes=swap_bytes, host_bytes=host_bytes)
        self.live: list[Pair] = []
        self.serial = 0
        self.peak = 0

    # What a scheduler and a method may do.

    @precondition(lambda self: len(self.live) < 4)
    @rule(columns=st.sampled_from([(), COLUMNS]))
    def new(self, columns: tuple[Field, ...]) -> None:
        sequence = self.cache.new_sequence(columns)
        for name, tier in STORES.items():
            sequence.add_store(name, dict.fromkeys(STORE_LAYERS, STORED), tier)
        self.live.append((sequence, Model([[] for _ in range(self.layout.n_rows)], columns)))

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), trim=st.booleans())
    def append(self, data: st.DataObject, trim: bool) -> None:
        batch = data.draw(st.lists(st.sampled_from(self.resident()), min_size=1, unique_by=id))
        self.extend(data, batch, trim)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), layers=st.sampled_from([range(1), range(1, 3), range(2, 3)]))
    def append_to_some_layers(self, data: st.DataObject, layers: range) -> None:
        self.extend(data, [self.draw(data)], trim=True, layers=layers)

    def extend(
        self, data: st.DataObject, batch: list[Pair], trim: bool, layers: range | None = None
    ) -> None:
        reserved, serials = [], []
        for sequence, model in batch:
            n = data.draw(st.integers(1, 13))
            if self.fits_or_leaves_all_unchanged(sequence, n, layers):
                reserved.append((sequence, model))
                serials.append(self.new_serials(n))
        if not reserved:
            return
        self.note_peak()
        tokens.append(self.cache, [sequence for sequence, _ in reserved], serials, layers)
        for (sequence, model), new in zip(reserved, serials, strict=True):
            positions = range(model.next_position, model.next_position + len(new))
            for row in self.rows_of(model, layers or range(len(LAYERS))):
                row.extend(Token(*two) for two in zip(new, new, positions, strict=True))
            model.next_position += 0 if layers else len(new)
            if trim:
                sequence.trim()
                self.trim(model)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), n=st.integers(1, 13))
    def reserve_only(self, data: st.DataObject, n: int) -> None:
        self.fits_or_leaves_all_unchanged(self.draw(data)[0], n)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), layer=st.integers(0, len(LAYERS) - 1))
    def keep(self, data: st.DataObject, layer: int) -> None:
        sequence, model = self.draw(data)
        rows = model.rows[self.layout.rows(layer)]
        kept = [data.draw(self.subset(len(row))) for row in rows]
        indices = [np.array(head, dtype=np.int64) for head in kept]
        if not self.unless_out_of_pages(lambda: sequence.keep(layer, indices)):
            return
        for row, head in zip(rows, kept, strict=True):
            row[:] = [row[i] for i in head]

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), n=st.integers(1, 3))
    def take_out(self, data: st.DataObject, n: int) -> None:
        sequence, model = self.draw(data)
        rows = model.rows[self.layout.rows(0)]
        for _ in range(n):
            gone = np.array([data.draw(st.integers(-1, len(row) - 1)) for row in rows])
            if not self.unless_out_of_pages(lambda gone=gone: sequence.take_out(0, gone)):
                return
            for row, i in zip(rows, gone.tolist(), strict=True):
                if i >= 0:
                    del row[i]

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        sequence, model = self.draw(data)
        n = data.draw(st.integers(0, min(9, min(map(len, model.rows)))))
        kept = data.draw(self.subset(n))
        if not self.unless_out_of_pages(lambda: sequence.retract(n, kept)):
            return
        for row in model.rows:
            tail = row[len(row) - n :]
            row[len(row) - n :] = [tail[i] for i in kept]
        model.next_position -= n - len(kept)

    @precondition(lambda self: self.resident())
    @rule(
        data=st.data(),
        layer=st.integers(0, len(LAYERS) - 1),
        which=st.sampled_from(["k", "v", "kv"]),
    )
    def write(self, data: st.DataObject, layer: int, which: str) -> None:
        sequence, model = self.draw(data)
        rows = list(range(*self.layout.rows(layer).indices(99)))
        indices = [data.draw(self.subset(len(model.rows[row]))) for row in rows]
        serials = [self.new_serials(len(head)) for head in indices]
        shape = LAYERS[layer]
        k = [tokens.keys(new, row, shape.k_dim) for new, row in zip(serials, rows, strict=True)]
        v = [tokens.values(new, row, shape.v_dim) for new, row in zip(serials, rows, strict=True)]
        arrays = [np.array(head, dtype=np.int32) for head in indices]
        written = self.unless_out_of_pages(
            lambda: sequence.write(
                layer, arrays, k if "k" in which else None, v if "v" in which else None
            )
        )
        if not written:
            return
        for row, head, new in zip(rows, indices, serials, strict=True):
            for i, serial in zip(head, new, strict=True):
                changes = dict.fromkeys(which, serial)
                model.rows[row][i] = model.rows[row][i]._replace(**changes)

    @precondition(lambda self: any(model.columns for _, model in self.resident()))
    @rule(data=st.data(), layer=st.integers(0, len(LAYERS) - 1), add=st.booleans())
    def score(self, data: st.DataObject, layer: int, add: bool) -> None:
        with_columns = [pair for pair in self.resident() if pair[1].columns]
        sequence, model = data.draw(st.sampled_from(with_columns))
        rows = model.rows[self.layout.rows(layer)]
        new = torch.arange(len(rows) * max(map(len, rows))).view(len(rows), -1) + self.serial
        self.serial += 1
        if add:  # by where tokens lie, which is where they belong after a look at the pages
            if not self.unless_out_of_pages(lambda: sequence.pages(layer)):
                return
            change = lambda: sequence.accumulate(layer, "score", new.float())  # noqa: E731
        else:
            change = lambda: sequence.set_column(layer, "score", new[..., None])  # noqa: E731
        if not self.unless_out_of_pages(change):
            return
        for row, scores in zip(rows, new.tolist(), strict=True):
            for i, token in enumerate(row):
                row[i] = token._replace(score=scores[i] + (token.score if add else 0))

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), layers=st.sampled_from([None, range(1, 3)]))
    def unshare(self, data: st.DataObject, layers: range | None) -> None:
        sequence, _ = self.draw(data)
        if self.unless_out_of_pages(lambda: sequence.unshare(layers)):
            references = self.references(self.cache.device_tier)
            for row in range(self.layout.n_rows)[self.span(layers)]:
                used = -(-int(sequence.lengths[row]) // self.layout.page_size)
                ids = sequence.tables[row, :used].tolist()
                assert {references[sequence.row_pools[row]][id] for id in ids} <= {1}

    @precondition(lambda self: self.resident())
    @rule(
        data=st.data(),
        name=st.sampled_from([*STORES]),
        layers=st.sampled_from([(0,), (2,), (0, 2)]),
        n=st.integers(1, 20),
    )
    def put(self, data: st.DataObject, name: str, layers: tuple[int, ...], n: int) -> None:
        sequence, model = self.draw(data)
        lengths = [len(self.stored_serials(model, name, layer)) for layer in layers]
        if any(length % STORED.page_size for length in lengths):
            return
        serials = self.new_serials(n)
        if self.unless_out_of_pages(
            lambda: sequence.put(name, layers, n, tokens.stored(serials, 2))
        ):
            model.stores[name].append(Put(set(layers), serials))

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), name=st.sampled_from([*STORES]), layer=st.sampled_from(STORE_LAYERS))
    def clear_store(self, data: st.DataObject, name: str, layer: int) -> None:
        sequence, model = self.draw(data)
        sequence.clear_store(name, layer)
        for put in model.stores[name]:
            put.layers.discard(layer)

    @precondition(lambda self: self.resident() and len(self.live) < 4)
    @rule(data=st.data(), grow=st.booleans())
    def fork(self, data: st.DataObject, grow: bool) -> None:
        sequence, model = self.draw(data)
        in_use = self.cache.bytes_in_use
        self.live.append((sequence.fork(), model.copy()))
        assert self.cache.bytes_in_use == in_use
        if grow:
            self.extend(data, [(sequence, model), self.live[-1]], trim=False)

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        sequence, model = self.draw(data)
        before = self.state()
        try:
            sequence.swap_out()
        except OutOfSwap:
            assert self.state() == before
            held, new = self.copies_held(), Counter[int]()
            ids, pools = (array.tolist() for array in self.used_pages(sequence))
            for id, pool in set(zip(ids, pools, strict=True)):
                [copy] = self.cache.copies._pools[pool].of(np.array([id]))
                if copy < 0:
                    new[pool] += 1
                else:
                    held[pool][copy] += 1
            assert not self.room_for(new, self.cache.copies.host, held)
        else:
            assert sequence.bytes == self.swapped_bytes(sequence, model)

    @precondition(lambda self: any(sequence.swapped for sequence, _ in self.live))
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        swapped = [pair for pair in self.live if pair[0].swapped]
        sequence, model = data.draw(st.sampled_from(swapped))
        before = self.state()
        try:
            sequence.swap_in()
        except OutOfPages:
            assert self.state() == before
            needed = Counter(np.repeat(sequence.row_pools, sequence.page_counts).tolist())
            pool = self.cache.device_tier.number(STORED)
            needed[pool] += model.store_bytes("device") // STORED.page_bytes
            assert not self.room_for(needed)

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
                rows = range(*self.layout.rows(i).indices(99))
                longest = max(len(model.rows[row]) for row in rows)
                all_k, all_v = sequence.keys_values(i)
                positions = sequence.positions_of(i)
                assert all_k.shape == (len(rows), longest, layer.k_dim)
                for head, row in enumerate(rows):
                    held = model.rows[row]
                    n = len(held)
                    assert sequence.lengths[row] == n
                    k = tokens.keys([token.k for token in held], row, layer.k_dim)
                    v = tokens.values([token.v for token in held], row, layer.v_dim)
                    assert torch.equal(sequence.contents(i, head, "k"), k)
                    assert torch.equal(all_k[head, :n], k)
                    assert torch.equal(all_v[head, :n], v)
                    assert not all_k[head, n:].any()
                    assert not all_v[head, n:].any()
                    want = [token.position for token in held]
                    assert sequence.positions(i, head).tolist() == want
                    assert positions[head].tolist() == want + [-1] * (longest - n)
                if model.columns:
                    scores = sequence.column(i, "score")[..., 0].tolist()
                    for head, row in enumerate(rows):
                        held = [token.score for token in model.rows[row]]
                        assert scores[head] == held + [0] * (longest - len(held))

    @invariant()
    def stores_equal_the_model(self) -> None:
        for sequence, model in self.resident():
            for name in STORES:
                for layer in STORE_LAYERS:
                    serials = self.stored_serials(model, name, layer)
                    assert sequence.store_length(name, layer).tolist() == [len(serials)] * 2
                    fields = sequence.stored(name, layer)
                    for field_name, values in tokens.stored(serials, 2).items():
                        assert torch.equal(fields[field_name], values)

    @invariant()
    def references_and_bytes_equal_the_tables(self) -> None:
        for tier in (self.cache.device_tier, self.cache.host_tier):
            in_use = 0
            for pool, references in zip(tier.pools, self.references(tier), strict=True):
                ids = np.array(list(references), dtype=np.int32)
                assert pool.references(ids).tolist() == list(references.values())
                assert pool.bytes_in_use == len(references) * pool.page_bytes
                in_use += pool.bytes_in_use
            assert tier.arena.bytes_in_use == in_use
        assert self.cache.free_bytes == self.cache.capacity_bytes - self.cache.bytes_in_use
        for sequence, model in self.live:
            swapped = self.swapped_bytes(sequence, model)
            assert sequence.bytes >= swapped
            assert sequence.bytes == swapped or not sequence.swapped
            assert sequence.host_bytes == model.store_bytes("host")
        resident = [sequence for sequence, _ in self.resident()]
        if len(resident) > 1:
            assert self.cache.distinct_bytes(resident) == self.cache.bytes_in_use

    @invariant()
    def a_copy_is_what_its_page_is_and_none_is_lost(self) -> None:
        copies, held = self.cache.copies, self.copies_held()
        sizes = [pool.page_bytes for pool in self.cache.pools]
        needed = sum(size * len(pages) for size, pages in zip(sizes, held, strict=False))
        assert needed == self.cache.swap_bytes_in_use <= self.cache.swap_bytes
        assert copies.host.arena.bytes_in_use == needed + copies.spare_bytes
        links.check(self.cache, held)

    @invariant()
    def the_peak_is_the_most_that_was_in_use(self) -> None:
        self.note_peak()
        assert self.peak <= self.cache.bytes_peak <= self.cache.capacity_bytes

    def teardown(self) -> None:
        for sequence, _ in self.live:
            sequence.free()
        assert self.cache.bytes_in_use == 0
        assert self.cache.host_bytes_in_use == 0
        assert self.cache.copies.host.arena.bytes_in_use == 0
        for pool in self.cache.pools:
            assert pool.free_pages == self.cache.arena.n_blocks * pool.pages_per_block

    # The naive model.

    def resident(self) -> list[Pair]:
        return [pair for pair in self.live if not pair[0].swapped]

    def draw(self, data: st.DataObject) -> Pair:
        return data.draw(st.sampled_from(self.resident()))

    def new_serials(self, n: int) -> list[int]:
        self.serial += n
        return list(range(self.serial - n, self.serial))

    def subset(self, length: int) -> st.SearchStrategy[list[int]]:
        if length == 0:
            return st.just([])
        return st.one_of(
            st.sets(st.integers(0, length - 1)).map(sorted),
            st.integers(0, length).map(lambda n: list(range(n))),
            st.integers(0, length).map(lambda n: list(range(n, length))),
            st.just(list(range(0, length, 2))),
        )

    def rows_of(self, model: Model, layers: Sequence[int]) -> Iterator[list[Token]]:
        return (row for layer in layers for row in model.rows[self.layout.rows(layer)])

    def span(self, layers: range | None) -> slice:
        layers = layers or range(len(LAYERS))
        return slice(self.layout.rows(layers[0]).start, self.layout.rows(layers[-1]).stop)

    def stored_serials(self, model: Model, name: str, layer: int) -> list[int]:
        puts = [put for put in model.stores[name] if layer in put.layers]
        return [serial for put in puts for serial in put.serials]

    def trim(self, model: Model) -> None:
        page_size = self.layout.page_size
        for i, layer in enumerate(LAYERS):
            for row in model.rows[self.layout.rows(i)] if layer.window else []:
                # The newest token that the next query cannot see, if none was evicted.
                hidden = max(0, len(row) - layer.window + 1)
                del row[: hidden // page_size * page_size]

    def unless_out_of_pages(self, operation: Callable[[], object]) -> bool:
        """Whether the operation ran; if its pages did not fit, nothing may have changed."""
        before = self.state()
        try:
            operation()
        except OutOfPages:
            assert self.state() == before
            return False
        return True

    def fits_or_leaves_all_unchanged(
        self, sequence: SequenceCache, n: int, layers: range | None = None
    ) -> bool:
        needed: Counter[int] = Counter()
        references = self.references(self.cache.device_tier)
        for row in range(self.layout.n_rows)[self.span(layers)]:
            pool, length = int(sequence.row_pools[row]), int(sequence.lengths[row])
            tail, filled = divmod(length, self.layout.page_size)
            pages = -(-(length + n) // self.layout.page_size)
            needed[pool] += max(0, pages - int(sequence.page_counts[row]))
            needed[pool] += filled > 0 and references[pool][int(sequence.tables[row, tail])] > 1
        in_use = self.cache.bytes_in_use
        if not self.unless_out_of_pages(lambda: sequence.reserve(n, layers)):
            assert not self.room_for(needed)
            return False
        taken = sum(count * self.cache.pools[pool].page_bytes for pool, count in needed.items())
        assert self.cache.bytes_in_use == in_use + taken
        return True

    def tables(self) -> Iterator[PageTables]:
        """All page tables: of live pages, and of stores."""
        for sequence, _ in self.live:
            if not sequence.swapped:
                yield sequence
            for name, store in sequence.stores.items():
                if not sequence.swapped or STORES[name] == "host":
                    yield store

    def references(self, tier: object) -> list[Counter[int]]:
        """How often each page of each pool stands in the tables."""
        counts: list[Counter[int]] = [Counter() for _ in tier.pools]
        for tables in self.tables():
            for row, pool in enumerate(tables.row_pools if tables.tier is tier else ()):
                counts[pool].update(tables.tables[row, : tables.page_counts[row]].tolist())
        return counts

    def copies_held(self) -> list[Counter[int]]:
        """How often each page of host memory is held by sequences that are swapped out."""
        held: list[Counter[int]] = [Counter() for _ in self.cache.copies._pools]
        for sequence, _ in self.live:
            if sequence._swapped is not None:
                swapped = sequence._swapped
                for copy, pool in zip(swapped.copies.tolist(), swapped.pools.tolist(), strict=True):
                    held[pool][copy] += 1
        return held

    def used_pages(self, sequence: SequenceCache) -> tuple[np.ndarray, np.ndarray]:
        """Ids and pools of the device pages of a sequence that hold tokens."""
        store = sequence.stores["device"]
        used = -(-sequence.lengths // self.layout.page_size)
        ids, pools = zip(sequence.held(used), store.held(), strict=True)
        return np.concatenate(ids), np.concatenate(pools)

    def room_for(
        self,
        pages: Counter[int],
        tier: Tier | None = None,
        references: list[Counter[int]] | None = None,
    ) -> bool:
        """Whether so many pages of each pool fit beside those in use, block by block."""
        tier = tier or self.cache.device_tier
        references = references or self.references(tier)
        arena, blocks_left = tier.arena, tier.arena.n_blocks
        for i, pool in enumerate(tier.pools):
            if not pool.pages_per_block:
                if pages[i]:
                    return False
                continue
            held = {id * 64 // arena.block_bytes for id in references[i]}
            free_in_held = len(held) * pool.pages_per_block - len(references[i])
            more = max(0, pages[i] - free_in_held)
            blocks_left -= len(held) + -(-more // pool.pages_per_block)
        return blocks_left >= 0

    def swapped_bytes(self, sequence: SequenceCache, model: Model) -> int:
        """What a sequence takes when it is swapped out: no pages that hold no token."""
        layout = self.layout.with_columns(model.columns)
        pages = np.array([-(-len(row) // self.layout.page_size) for row in model.rows])
        return layout.bytes_of(layout.count(pages)) + model.store_bytes("device")

    def state(self) -> list[object]:
        """Everything that a failed operation must leave as it was."""
        tables = [
            (
                part.lengths.tolist(),
                [part.tables[row, :n].tolist() for row, n in enumerate(part.page_counts.tolist())],
            )
            for part in self.tables()
        ]
        numbers = [(s.swapped, s.next_position, s.bytes, s.host_bytes) for s, _ in self.live]
        cache = self.cache
        totals = (cache.bytes_in_use, cache.swap_bytes_in_use, cache.host_bytes_in_use)
        return [tables, numbers, totals]

    def note_peak(self) -> None:
        self.peak = max(self.peak, self.cache.bytes_in_use)


class TestCacheMachine(CacheMachine.TestCase):
    settings = settings(
        max_examples=40,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.slow
class TestCacheMachineAtLength(CacheMachine.TestCase):
    settings = settings(TestCacheMachine.settings, max_examples=100, stateful_step_count=50)
