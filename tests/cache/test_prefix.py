"""The prefix tree gives a sequence exactly the pages of what it begins with, and leaks none."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import float32

from tamis.cache import (
    Block,
    CacheLayout,
    Field,
    LayerShape,
    OutOfPages,
    PagedCache,
    PageError,
    PrefixTree,
    SequenceCache,
)
from tests.cache import links
from tests.cache import tokens as numbered

PAGE = 4
LAYERS = (
    LayerShape(2, k_dim=8, v_dim=8),
    LayerShape(1, k_dim=4, v_dim=6, window=6),
    LayerShape(2, k_dim=8, v_dim=8, window=11),
)
DENSE = (LayerShape(2, k_dim=8, v_dim=8), LayerShape(1, k_dim=4, v_dim=6))

Tokens = tuple[int, ...]


def blocks_of(tree: PrefixTree) -> dict[tuple[tuple[Field, ...], Tokens], Block]:
    """Every block by its columns and the tokens up to its end."""
    found = {}
    roots = [((), root) for root in tree._roots.values()]
    while roots:
        before, block = roots.pop()
        mine = (*before, *np.frombuffer(block.tokens, dtype=np.int32).tolist())
        if mine:
            found[block.columns, mine] = block
        roots += [(mine, child) for child in block.children.values()]
    return found


@dataclass(eq=False)
class User:
    """A sequence, its tokens so far, and what it uses of the tree."""

    cache: SequenceCache
    tokens: Tokens = ()
    block: Block | None = None
    gone: list[int] = field(default_factory=list)  # leading pages that each row dropped


class PrefixMachine(RuleBasedStateMachine):
    """Drives some sequences over one tree, against a dict of prefixes."""

    @initialize(
        layers=st.sampled_from([LAYERS, DENSE]),
        capacity=st.sampled_from([25_000, 40_000, 400_000]),
        swap_bytes=st.sampled_from([0, 8_000, 100_000]),
    )
    def start(self, layers: tuple[LayerShape, ...], capacity: int, swap_bytes: int) -> None:
        self.layout = CacheLayout(layers, PAGE, float32)
        self.cache = PagedCache(self.layout, capacity, swap_bytes=swap_bytes)
        self.tree = PrefixTree(self.cache)
        self.kept: dict[Tokens, set[int]] = {}  # prefixes of whole pages: rows held of the last
        self.users: list[User] = []
        self.serials: dict[Tokens, int] = {}

    @precondition(lambda self: len(self.users) < 4)
    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30))
    def begin(self, prompt: list[int]) -> None:
        n_most = len(prompt) - 1
        block = self.tree.match(prompt, n_most)
        assert (0 if block is None else block.depth * PAGE) == self.longest(tuple(prompt), n_most)
        if block is not None and not self.tree.fetch(block):
            block = self.tree.match(prompt, n_most, resident=True)
        self.note_forgotten()
        if block is None:
            user = User(self.cache.new_sequence())
            user.gone = [0] * self.layout.n_rows
        else:
            n = block.depth * PAGE
            user = User(self.tree.begin(block), tuple(prompt[:n]), block)
            user.gone = [self.first_seen(n, row) for row in range(self.layout.n_rows)]
        self.users.append(user)

    @precondition(lambda self: self.users)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=13))
    def compute(self, data: st.DataObject, more: list[int]) -> None:
        user = data.draw(st.sampled_from(self.users))
        while True:
            try:
                user.cache.reserve(len(more))
                break
            except OutOfPages:
                if not self.give_up(1):
                    return
        before = len(user.tokens)
        user.tokens += tuple(more)
        prefixes = [user.tokens[: i + 1] for i in range(before, len(user.tokens))]
        serials = [self.serials.setdefault(prefix, len(self.serials)) for prefix in prefixes]
        numbered.append(self.cache, [user.cache], [serials])
        away = {key for (_, key), block in blocks_of(self.tree).items() if block.copy is not None}
        user.block = self.tree.extend(user.block, user.tokens, user.cache)
        for end in range(PAGE, len(user.tokens) + 1, PAGE):
            held = {row for row, gone in enumerate(user.gone) if gone * PAGE < end}
            if end > before // PAGE * PAGE:  # those before were handed in then
                if user.tokens[:end] in away:
                    self.kept[user.tokens[:end]] = set()  # its own pages stand for the copy
                self.kept.setdefault(user.tokens[:end], set()).update(held)
        user.cache.trim()
        for row in range(self.layout.n_rows):
            user.gone[row] = max(user.gone[row], self.first_seen(len(user.tokens), row))

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        user = data.draw(st.sampled_from(self.users))
        if user.block is not None:
            self.tree.use(user.block)
        self.users.append(User(user.cache.fork(), user.tokens, user.block, list(user.gone)))

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        user = data.draw(st.sampled_from(self.users))
        self.users.remove(user)
        user.cache.free()
        if user.block is not None:
            self.tree.leave(user.block)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def write_to_a_shared_page(self, data: st.DataObject) -> None:
        """What a sequence writes to its own first token changes nobody else's pages."""
        user = data.draw(st.sampled_from(self.users))
        if not user.tokens:
            return
        other = user.cache.fork()
        key = numbered.keys([0], 15, 8)
        with contextlib.suppress(OutOfPages):
            other.write(0, [np.zeros(1, np.int32)] * 2, k=[key] * 2)
        other.free()

    @rule(n=st.integers(1, 3))
    def evict(self, n: int) -> None:
        self.give_up(n)

    def give_up(self, n: int) -> int:
        used = {id(block) for user in self.users if user.block for block in user.block.path()}
        before = self.resident()
        given = self.tree.evict(n)
        gone = {key: before[key] for key in before.keys() - self.resident().keys()}
        assert len(gone) == given
        assert given == min(n, sum(block not in used for block in before.values()))
        assert not set(gone.values()) & used
        self.note_forgotten()
        return given

    @rule(n_bytes=st.sampled_from([100, 3_000]))
    def forget_copies(self, n_bytes: int) -> None:
        before = self.tree.host_bytes
        assert self.tree.forget_copies(n_bytes) == (n_bytes <= before)
        assert self.tree.host_bytes <= max(0, before - n_bytes)
        self.note_forgotten()

    def resident(self) -> dict[Tokens, int]:
        """The blocks with pages, by their tokens."""
        blocks = blocks_of(self.tree).items()
        return {key: id(block) for (_, key), block in blocks if block.copy is None}

    def note_forgotten(self) -> None:
        """Take out what the tree has forgotten: nothing that a sequence uses."""
        left = {key for _, key in blocks_of(self.tree)}
        for key in self.kept.keys() - left:
            assert not any(
                user.block
                and user.tokens[: len(key)] == key
                and user.block.depth * PAGE >= len(key)
                for user in self.users
            )
            del self.kept[key]

    @rule()
    def evict_windows(self) -> None:
        """Pages of windows that only the tree holds go; those that sequences hold stay."""
        before = {key: set(rows) for key, rows in self.kept.items()}
        self.tree.evict_windows()
        for key, rows in before.items():
            holds = [u for u in self.users if u.tokens[: len(key)] == key]
            for row in rows:
                block = blocks_of(self.tree)[(), key]
                if self.window(row) is None or block.copy is not None:
                    continue
                shared = any(
                    u.gone[row] * PAGE < len(key)
                    and u.cache.tables[row, len(key) // PAGE - 1 - u.gone[row]] == block.ids[row]
                    and block.held[row]
                    for u in holds
                )
                if not shared:
                    self.kept[key].discard(row)

    # The naive model.

    def window(self, row: int) -> int | None:
        layers = self.layout.layers
        return next(
            layer.window for i, layer in enumerate(layers) if row < self.layout.rows(i).stop
        )

    def first_seen(self, n: int, row: int) -> int:
        """The page of the first token that the query at position n sees."""
        window = self.window(row)
        return 0 if window is None else max(0, n - window + 1) // PAGE

    def longest(self, prompt: Tokens, n_most: int) -> int:
        """The longest prefix of whole pages of which all that the next query sees is there."""
        best = 0
        for n in range(PAGE, n_most + 1, PAGE):
            if prompt[:n] not in self.kept:
                break
            seen = [
                row in self.kept[prompt[: (position // PAGE + 1) * PAGE]]
                for row in range(self.layout.n_rows)
                for position in range(max(0, n - (self.window(row) or n + 1) + 1), n)
            ]
            best = n if all(seen) else best
        return best

    @invariant()
    def blocks_are_the_prefixes(self) -> None:
        if not hasattr(self, "tree"):
            return
        blocks = blocks_of(self.tree)
        assert {key for _, key in blocks} == self.kept.keys()
        for (_, key), block in blocks.items():
            assert set(np.flatnonzero(block.held | block.copied).tolist()) == self.kept[key]
            assert not (block.held & block.copied).any()
            assert (block.copy is not None) == block.copied.any()
            children = block.children.values()
            assert block.residents == sum(child.copy is None for child in children)
            assert not (block.copy is not None and block.residents)

    @invariant()
    def sequences_hold_what_was_computed(self) -> None:
        for user in getattr(self, "users", []):
            assert user.cache.next_position == len(user.tokens)
            for layer, shape in enumerate(self.layout.layers):
                for head in range(shape.kv_heads):
                    row = self.layout.rows(layer).start + head
                    first = user.gone[row] * PAGE
                    positions = list(range(first, len(user.tokens)))
                    assert user.cache.positions(layer, head).tolist() == positions
                    serials = [self.serials[user.tokens[: i + 1]] for i in positions]
                    keys = user.cache.contents(layer, head, "k")
                    assert keys.equal(numbered.keys(serials, row, shape.k_dim))

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "tree"):
            return
        owners: Counter[int] = Counter()
        for user in self.users:
            owners.update(user.cache.held_pages()[0].tolist())
        blocks = blocks_of(self.tree).values()
        in_tree = [page for block in blocks for page in block.ids[block.held].tolist()]
        assert len(set(in_tree)) == len(in_tree)
        owners.update(in_tree)
        row_pools = self.cache.rows_with(())[1]
        for block in blocks:
            for row in np.flatnonzero(block.held):
                pool = self.cache.pools[row_pools[row]]
                [count] = pool.references(block.ids[[row]])
                assert count == owners[block.ids[row]]
        sizes = {
            page: self.cache.pools[pool].page_bytes
            for user in self.users
            for page, pool in zip(*user.cache.held_pages(), strict=True)
        }
        mine = {
            int(block.ids[row]): self.cache.pools[row_pools[row]].page_bytes
            for block in blocks
            for row in np.flatnonzero(block.held)
        }
        used = {id(b) for user in self.users if user.block for b in user.block.path()}
        assert self.tree.bytes == sum(mine.values())
        assert self.tree.used_bytes == sum(
            self.cache.pools[row_pools[row]].page_bytes
            for block in blocks
            if id(block) in used
            for row in np.flatnonzero(block.held)
        )
        assert self.cache.bytes_in_use == sum((mine | sizes).values())
        copied = sum(
            self.cache.pools[row_pools[row]].page_bytes
            for block in blocks
            for row in np.flatnonzero(block.copied)
        )
        assert self.tree.host_bytes == self.cache.swap_bytes_in_use == copied
        held: list[Counter[int]] = [Counter() for _ in self.cache.copies._pools]
        for block in blocks:
            for row, copy in zip(np.flatnonzero(block.copied), _copies(block), strict=True):
                held[row_pools[row]][copy] += 1
        links.check(self.cache, held)
        assert copied <= self.cache.swap_bytes

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for user in self.users:
            user.cache.free()
            if user.block is not None:
                self.tree.leave(user.block)
        assert self.tree.idle_bytes == self.tree.bytes == self.cache.bytes_in_use
        self.tree.clear()
        assert self.tree.bytes == self.cache.bytes_in_use == 0
        assert self.tree.host_bytes == self.cache.copies.host.arena.bytes_in_use == 0


def _copies(block: Block) -> list[int]:
    return [] if block.copy is None else block.copy.tolist()


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


# --- single statements ----------------------------------------------------------------------------


def computed(tree: PrefixTree, cache: PagedCache, prompt: list[int], hits: int = 0) -> None:
    """Have a sequence compute a prompt, and begin with it so many times again."""
    sequence = cache.new_sequence()
    numbered.grow(sequence, prompt)
    block = tree.extend(None, prompt, sequence)
    sequence.free()
    for _ in range(hits):
        assert block is not None
        tree.begin(block).free()
        tree.count_hit(block)
        tree.leave(block)
    if block is not None:
        tree.leave(block)


@pytest.fixture
def cache() -> PagedCache:
    return PagedCache(CacheLayout(DENSE, PAGE, float32), 400_000)


def test_ids_decide_and_not_their_hash(cache: PagedCache) -> None:
    tree = PrefixTree(cache)
    computed(tree, cache, [1, 2, 3, 4])
    assert tree.match([1, 2, 3, 5, 0], 4) is None
    assert tree.match([2, 1, 3, 4, 0], 4) is None
    found = tree.match([1, 2, 3, 4, 0], 4)
    assert found is not None
    assert found.depth == 1


def test_a_match_leaves_the_tokens_that_it_is_told_to(cache: PagedCache) -> None:
    tree = PrefixTree(cache)
    computed(tree, cache, list(range(12)))
    depths = [block.depth if (block := tree.match(range(12), n)) else 0 for n in (3, 4, 11, 12)]
    assert depths == [0, 1, 2, 3]


def test_side_columns_have_trees_of_their_own(cache: PagedCache) -> None:
    tree, columns = PrefixTree(cache), (Field("bound", float32, 2, rows=1),)
    computed(tree, cache, [1, 2, 3, 4])
    assert tree.match([1, 2, 3, 4], 4, columns) is None
    sequence = cache.new_sequence(columns)
    numbered.grow(sequence, [1, 2, 3, 4])
    block = tree.extend(None, [1, 2, 3, 4], sequence)
    assert block is not None
    sequence.free()
    tree.leave(block)
    assert tree.match([1, 2, 3, 4], 4, columns) is block
    again = tree.begin(block)
    assert again.layout.columns == columns
    assert again.column(0, "k").shape == (2, 4, 8)
    again.free()


def test_the_least_recently_used_goes_first(cache: PagedCache) -> None:
    tree = PrefixTree(cache)
    for first in (10, 20, 30):
        computed(tree, cache, [first, 0, 0, 0])
    tree.evict(2)
    left = [first for first in (10, 20, 30) if tree.match([first, 0, 0, 0], 4)]
    assert left == [30]


def test_what_is_asked_for_often_outlives_what_came_later(cache: PagedCache) -> None:
    tree = PrefixTree(cache)
    computed(tree, cache, [10, 0, 0, 0], hits=3)
    for first in (20, 30):
        computed(tree, cache, [first, 0, 0, 0])
    tree.evict(2)
    assert tree.match([10, 0, 0, 0], 4) is not None


def test_what_is_no_longer_asked_for_goes_in_the_end(cache: PagedCache) -> None:
    tree = PrefixTree(cache)
    computed(tree, cache, [10, 0, 0, 0], hits=3)
    for first in range(20, 30):
        computed(tree, cache, [first, 0, 0, 0])
        tree.evict(1)
        if tree.match([10, 0, 0, 0], 4) is None:
            break
    assert first < 29


def test_leaves_go_before_what_they_follow(cache: PagedCache) -> None:
    tree = PrefixTree(cache)
    computed(tree, cache, list(range(12)), hits=2)
    computed(tree, cache, [5, 5, 5, 5])
    tree.evict(3)
    block = tree.match(range(12), 12)
    assert block is not None
    assert block.depth == 1


def test_a_sequence_that_evicted_tokens_hands_nothing_in(cache: PagedCache) -> None:
    tree, sequence = PrefixTree(cache), cache.new_sequence()
    numbered.grow(sequence, list(range(8)))
    sequence.keep(0, [np.arange(4), np.arange(4)])
    with pytest.raises(PageError, match="evicted"):
        tree.extend(None, range(8), sequence)


def test_a_sequence_that_writes_leaves_the_tree_as_it_is(cache: PagedCache) -> None:
    tree, sequence = PrefixTree(cache), cache.new_sequence()
    numbered.grow(sequence, list(range(8)))
    block = tree.extend(None, range(8), sequence)
    assert block is not None
    sequence.write(0, [np.zeros(1, np.int32)] * 2, k=[numbered.keys([99], 0, 8)] * 2)
    sequence.keep(1, [np.arange(3, 8)])
    again = tree.begin(block)
    assert again.contents(0, 0, "k").equal(numbered.keys(range(8), 0, 8))
    assert again.contents(1, 0, "k").equal(numbered.keys(range(8), 2, 4))


def test_many_ends_of_sequences_leave_nothing_behind(cache: PagedCache) -> None:
    """The order of giving up is kept in a heap whose old entries go."""
    tree = PrefixTree(cache)
    computed(tree, cache, [1, 2, 3, 4], hits=1000)
    assert len(tree._heap) < 10


# --- host memory ----------------------------------------------------------------------------------


@pytest.fixture
def swapping() -> PagedCache:
    return PagedCache(CacheLayout(DENSE, PAGE, float32), 400_000, swap_bytes=400_000)


def test_what_is_given_up_comes_back_from_host_memory(swapping: PagedCache) -> None:
    tree = PrefixTree(swapping)
    computed(tree, swapping, list(range(12)))
    assert tree.evict(3) == 3
    assert tree.bytes == swapping.bytes_in_use == 0
    assert tree.host_bytes == swapping.swap_bytes_in_use > 0
    assert tree.match(range(13), 12, resident=True) is None
    block = tree.match(range(13), 12)
    assert block is not None
    assert tree.fetch(block)
    assert tree.host_bytes == swapping.swap_bytes_in_use == 0
    again = tree.begin(block)
    assert again.contents(0, 1, "k").equal(numbered.keys(range(12), 1, 8))
    assert again.contents(1, 0, "v").equal(numbered.values(range(12), 2, 6))
    assert again.positions(1, 0).tolist() == list(range(12))


def test_the_oldest_copies_are_forgotten_first() -> None:
    one = CacheLayout(DENSE, PAGE, float32).bytes_for(PAGE)
    layout = CacheLayout(DENSE, PAGE, float32)
    cache = PagedCache(layout, 400_000, swap_bytes=layout.capacity_for(layout.peak_pages(2 * PAGE)))
    tree = PrefixTree(cache)
    for first in (10, 20, 30):
        computed(tree, cache, [first, 0, 0, 0])
    tree.evict(3)
    left = [first for first in (10, 20, 30) if tree.match([first, 0, 0, 0], 4)]
    assert left == [20, 30]
    assert tree.forget_copies(1)
    assert tree.match([20, 0, 0, 0], 4) is None
    assert not tree.forget_copies(2 * one)


def test_what_came_back_goes_again_without_being_copied(swapping: PagedCache) -> None:
    tree = PrefixTree(swapping)
    computed(tree, swapping, list(range(12)))
    tree.evict(3)
    copied = swapping.copies.copied_bytes
    block = tree.match(range(13), 12)
    assert block is not None
    assert tree.fetch(block)
    assert tree.evict(3) == 3
    assert swapping.copies.copied_bytes == copied == tree.host_bytes
    assert tree.fetch(block)
    again = tree.begin(block)
    assert again.contents(0, 1, "k").equal(numbered.keys(range(12), 1, 8))


def test_a_prefix_and_a_sequence_that_go_have_one_copy(swapping: PagedCache) -> None:
    tree = PrefixTree(swapping)
    computed(tree, swapping, list(range(12)))
    block = tree.match(range(13), 12)
    assert block is not None
    sequence = tree.begin(block)
    sequence.swap_out()
    tree.leave(block)
    tree.evict(3)
    assert tree.host_bytes == sequence.bytes == swapping.swap_bytes_in_use
    tree.clear()
    sequence.swap_in()
    assert sequence.contents(0, 1, "k").equal(numbered.keys(range(12), 1, 8))


def test_without_room_what_is_on_the_device_is_what_there_is() -> None:
    layout = CacheLayout(DENSE, PAGE, float32)
    cache = PagedCache(layout, layout.capacity_for(layout.peak_pages(16)), swap_bytes=400_000)
    tree = PrefixTree(cache)
    computed(tree, cache, list(range(12)))
    tree.evict(2)
    other = cache.new_sequence()
    other.reserve(4)
    while cache.device_tier.can_allocate(np.ones(len(cache.pools), dtype=np.int32)):
        other.reserve(other.room + 1)
    block = tree.match(range(12), 12)
    assert block is not None
    assert block.depth == 3
    assert not tree.fetch(block)
    assert tree.used_bytes == 0
    found = tree.match(range(12), 12, resident=True)
    assert found is not None
    assert found.depth == 1
