"""Pages go to host memory and come back beside the device's work, and nobody meets them halfway.

With torch's own streams of the CPU every copy is made at once, the earliest that a GPU could make
it; with `LateStreams` each is made as late as it may be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tamis.cache import Field, PagedCache, PageFormat, SequenceCache
from tamis.cache.transfers import Transfers
from tests.cache import tokens
from tests.cache.streams import LateStreams
from tests.cache.test_copies import (
    LAYOUT,
    PAGE_BYTES,
    ROWS,
    STORED,
    contents,
    grown,
    keep,
    out_and_in,
    score,
    write,
)

CPU = torch.device("cpu")
COLUMNS = (Field("score", torch.float32, 1), Field("bound", torch.float32, 2, rows=1))


@pytest.fixture(params=["now", "late"])
def streams(request: pytest.FixtureRequest) -> Any:
    return torch.cpu if request.param == "now" else LateStreams()


def make_cache(streams: Any, staged_pages: int = 6, capacity: int = 60_000) -> PagedCache:
    """Two buffers for so many pages together, of sequences without columns."""
    transfers = Transfers(CPU, staged_pages * PAGE_BYTES, streams)
    return PagedCache(LAYOUT, capacity, CPU, 60_000, 60_000, transfers)


def scattered(cache: PagedCache, n: int) -> SequenceCache:
    """A sequence whose pages lie among those of others, in no order."""
    others = [grown(cache, 12) for _ in range(6)]
    for other in others[::2]:
        other.free()
    sequence = grown(cache, n)
    for other in others[1::2]:
        other.free()
    return sequence


def overwrite(cache: PagedCache) -> None:
    """Write to free pages, among them those that were freed last."""
    past = cache.new_sequence()
    tokens.grow(past, range(900, 940))
    past.free()


@pytest.mark.parametrize("staged_pages", [2, 5, 200])
def test_swapped_pages_come_back_as_they_went(streams: Any, staged_pages: int) -> None:
    """Through buffers for one page, for two, and for all; others write to the pages meanwhile."""
    cache = make_cache(streams, staged_pages)
    sequence = scattered(cache, 37)
    for _ in range(3):
        out_and_in(sequence)
        for layer, row in ((0, 0), (0, 1), (1, 2)):
            head = row - LAYOUT.rows(layer).start
            assert sequence.contents(layer, head, "k").equal(tokens.keys(range(37), row, 8))
            assert sequence.contents(layer, head, "v").equal(tokens.values(range(37), row, 8))


@pytest.mark.parametrize("change", [write, keep, score])
def test_pages_are_copied_as_they_were_when_they_were_given_up(streams: Any, change: Any) -> None:
    sequence = grown(make_cache(streams, 12), 16, COLUMNS)
    assert [out_and_in(sequence) for _ in range(2)] == [4 * ROWS, 0]
    change(sequence)
    expected = contents(sequence)
    for _ in range(2):
        out_and_in(sequence)
        for mine, one in zip(contents(sequence), expected, strict=True):
            assert torch.equal(mine, one)


def test_a_branch_may_write_to_shared_pages_at_once(streams: Any) -> None:
    sequence = grown(make_cache(streams), 16)
    branch = sequence.fork()
    sequence.swap_out()
    write(branch)
    sequence.swap_in()
    assert sequence.contents(1, 0, "v").equal(tokens.values(range(16), 2, 8))
    assert branch.contents(1, 0, "v")[5].equal(torch.ones(8))


def test_stores_are_swapped_too(streams: Any) -> None:
    sequence = grown(make_cache(streams, 12), 8)
    sequence.add_store("s", {0: STORED}, "device")
    sequence.put("s", (0,), 20, tokens.stored(range(20), 2))
    out_and_in(sequence)
    assert sequence.stored("s", 0)["k"].equal(tokens.stored(range(20), 2)["k"])


def arrived(sequence: SequenceCache) -> bool:
    return sequence.contents(0, 0, "k").equal(tokens.keys(range(16), 0, 8))


def test_pages_come_beside_what_is_computed_until_they_are_needed() -> None:
    streams = LateStreams()
    cache = make_cache(streams)
    sequence, other = grown(cache, 16), grown(cache, 16)
    sequence.swap_out()
    overwrite(cache)
    sequence.swap_in(beside=True)
    assert streams.side.n_pending > 0
    tokens.grow(other, range(16, 30))
    assert not arrived(sequence)
    cache.arrive()
    assert arrived(sequence)
    assert other.contents(0, 0, "k").equal(tokens.keys(range(30), 0, 8))


def test_pages_on_their_way_may_be_given_up_again(streams: Any) -> None:
    cache = make_cache(streams)
    sequence = grown(cache, 18)
    for _ in range(2):
        sequence.swap_out()
        overwrite(cache)
        sequence.swap_in(beside=True)
    sequence.swap_out()
    other = grown(cache, 40)
    sequence.swap_in()
    assert sequence.contents(0, 1, "k").equal(tokens.keys(range(18), 1, 8))
    assert other.contents(0, 1, "k").equal(tokens.keys(range(40), 1, 8))


def test_pages_freed_on_their_way_are_their_next_owners(streams: Any) -> None:
    cache = make_cache(streams)
    sequence = grown(cache, 40)
    sequence.swap_out()
    sequence.swap_in(beside=True)
    sequence.free()
    other = grown(cache, 40)
    other.write(0, [np.arange(40)] * 2, k=[torch.ones(40, 8)] * 2)
    streams.synchronize()
    assert other.contents(0, 1, "k").equal(torch.ones(40, 8))


def test_pages_that_follow_one_another_are_one_copy() -> None:
    streams = LateStreams()
    sequence = grown(make_cache(streams, staged_pages=200), 40)
    sequence.swap_out()
    assert streams.side.n_writes == 1
    sequence.swap_in()
    assert streams.side.n_writes == 1 + 2  # to the buffer, and from it to the pages


def host_store(cache: PagedCache, n: int) -> SequenceCache:
    """A sequence of which `n` tokens of both layers lie in host memory, in scattered pages."""
    sequence = cache.new_sequence()
    format = PageFormat.dense(4, 8, 8, torch.float32)
    sequence.add_store("s", {0: format, 1: format}, "host")
    for start in range(0, n, 4):
        serials = range(start, min(n, start + 4))
        for layer, heads in ((0, 2), (1, 1)):
            sequence.put("s", (layer,), len(serials), tokens.stored(serials, heads))
    return sequence


def test_pages_of_a_store_are_brought_one_after_the_other(streams: Any) -> None:
    """In two buffers that grow: what was asked for is there when it is waited for, and stays while
    the next pages come."""
    cache = make_cache(streams)
    format = PageFormat.dense(4, 8, 8, torch.float32)
    wanted = [(host_store(cache, n), n, layer) for n in (9, 16, 5, 40) for layer in (0, 1)]
    before = None
    for sequence, n, layer in wanted:
        store = sequence.stores["s"]
        ids, tables, lengths = store.laid_out(layer)
        following = cache.transfers.ahead(store.pool(store.rows(layer)), ids)
        if before is not None:
            check(*before, format)
        before = following, tables, lengths, n
    assert before is not None
    check(*before, format)


def check(arrive: Any, tables: Any, lengths: Any, n: int, format: PageFormat) -> None:
    keys = format.view(arrive(), "k")
    for head, table in enumerate(torch.from_numpy(tables[0]).long()):
        assert lengths[0, head] == n
        assert keys[table].flatten(0, 1)[:n].equal(tokens.keys(range(n), head, 8))


def test_one_memory_needs_no_transfers() -> None:
    assert PagedCache(LAYOUT, 60_000, "cpu", 60_000, 60_000).transfers is None
