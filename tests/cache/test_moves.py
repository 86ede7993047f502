"""Tokens and pages land where they belong, and nowhere else, on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.cache.arena import Arena
from tamis.cache.format import Field, PageFormat
from tamis.cache.moves import append
from tamis.cache.pool import PagePool
from tamis.platform import native_module, triton_installed
from tests.threads import on_threads


@pytest.fixture(params=["reference", "native", "triton"], scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that this machine has, Triton interpreted unless there is a GPU."""
    if request.param == "triton" and not triton_installed():
        pytest.skip("Triton is not installed")
    if request.param == "native" and native_module(warn=False) is None:
        pytest.skip("the extension is not built")
    return request.param


def page_tables(counts: list[list[int]], format: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """An arena of zeros, and tables [n, kv_heads, max_pages] of distinct pages in random order."""
    n_pages = sum(map(sum, counts))
    data = torch.zeros(max(1, n_pages) * format.page_bytes, dtype=torch.uint8)
    free = (torch.randperm(n_pages) * (format.page_bytes // 64)).tolist()
    widest = max(map(max, counts)) + 1
    tables = torch.full((len(counts), len(counts[0]), widest), 2**31 - 1, dtype=torch.int32)
    for row, heads in enumerate(counts):
        for head, count in enumerate(heads):
            tables[row, head, :count] = torch.tensor([free.pop() for _ in range(count)])
    return data, tables


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=4),
    new=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    page_size=st.sampled_from([1, 4, 16]),
    dims=st.sampled_from([(8, 8), (16, 24), (3, 5)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    starts_dtype=st.sampled_from([torch.int32, torch.int64]),
    beyond=st.integers(0, 20),
    seed=st.integers(0, 100),
)
def test_tokens_land_where_they_belong(
    backend: str,
    lengths: list[list[int]],
    new: list[int],
    page_size: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    starts_dtype: torch.dtype,
    beyond: int,
    seed: int,
) -> None:
    """And those that are no row's, `beyond` the last row, nowhere."""
    torch.manual_seed(seed)
    dense = PageFormat.dense(page_size, *dims, dtype)
    format = PageFormat(page_size, (*dense.fields, Field("score", torch.float32, 2)))
    new = new[: len(lengths)]
    counts = [
        [format.pages_for(length + added) for length in row]
        for row, added in zip(lengths, new, strict=True)
    ]
    data, tables = page_tables(counts, format)
    tokens = sum(new) + beyond
    # As models hand them over: [kv_heads, tokens, dim] transposed.
    k, v = (torch.randn(2, tokens, dim).to(dtype).transpose(0, 1) for dim in dims)
    positions = torch.randint(0, 1000, (tokens,), dtype=torch.int32)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=starts_dtype)

    want = data.clone()
    fields = {"k": k, "v": v, "position": positions[:, None, None].expand(-1, 2, 1)}
    for name, values in fields.items():
        view = format.view(want, name)
        for row, heads in enumerate(lengths):
            for head, length in enumerate(heads):
                for t in range(new[row]):
                    page, slot = divmod(length + t, page_size)
                    view[tables[row, head, page], slot] = values[starts[row] + t, head]

    length_table = torch.tensor(lengths, dtype=torch.int32)
    append(data, format, tables, length_table, starts, k, v, positions, backend=backend)
    assert torch.equal(data, want)
    assert length_table.tolist() == lengths


def test_a_long_prompt_of_many_heads(backend: str) -> None:
    """Enough bytes for several threads."""
    torch.manual_seed(0)
    format = PageFormat.dense(16, 64, 64, torch.float32)
    data, tables = page_tables([[64] * 8], format)
    k, v = torch.randn(1000, 8, 64), torch.randn(1000, 8, 64)
    positions, starts = torch.arange(1000, dtype=torch.int32), torch.tensor([0, 1000])
    lengths = torch.full((1, 8), 3, dtype=torch.int32)
    append(data, format, tables, lengths, starts, k, v, positions, backend=backend)
    for head in range(8):
        pages = tables[0, head, :64].long()
        for name, values in (("k", k), ("v", v)):
            rows = format.view(data, name)[pages].flatten(0, 1)[3:1003]
            assert torch.equal(rows, values[:, head])
        rows = format.view(data, "position")[pages].flatten()[3:1003]
        assert torch.equal(rows, positions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(3, 2, 9)}, r"k must be torch.float32 \[3, 2, 8\]"),
        ({"v": torch.zeros(3, 2, 8).half()}, r"v must be torch.float32 \[3, 2, 8\], got .*float16"),
        ({"tables": torch.zeros(1, 2, 4)}, "tables must be torch.int32"),
        ({"tables": torch.zeros(2, 2, 4).int()}, r"tables must be \[1, 2, max_pages\]"),
        ({"lengths": torch.zeros(1, 2).long()}, "lengths must be torch.int32"),
        ({"starts": torch.tensor([0, 1, 3])}, r"starts \[2\]"),
        ({"positions": torch.arange(3)}, "positions must be torch.int32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    format = PageFormat.dense(4, 8, 8, torch.float32)
    arguments = {
        "data": torch.zeros(8 * format.page_bytes, dtype=torch.uint8),
        "format": format,
        "tables": torch.zeros(1, 2, 4).int(),
        "lengths": torch.zeros(1, 2).int(),
        "starts": torch.tensor([0, 3]),
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        "positions": torch.arange(3).int(),
    }
    with pytest.raises(ValueError, match=message):
        append(**arguments | changes)


# --- within the arena, and out of it and into it ------------------------------------------------

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.sampled_from([(32, 32), (64, 64), (128, 64), (256, 256), (3, 5), (80, 96)])


@pytest.fixture(params=["reference", "native"], scope="module")
def on_host(request: pytest.FixtureRequest) -> Iterator[str]:
    """What moves tokens and pages where they lie in host memory."""
    if request.param == "native" and native_module(warn=False) is None:
        pytest.skip("the extension is not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAMIS_BACKEND", request.param)
        yield request.param


def pages_of(format: PageFormat, n: int, seed: int) -> tuple[PagePool, np.ndarray]:
    """A pool, and the ids of `n` pages in it in random order, of random bytes."""
    block = 4 * format.page_bytes
    pool = PagePool(Arena((n // 4 + 2) * block, block_bytes=block), format)
    generator = torch.Generator().manual_seed(seed)
    size = pool.arena.data.shape
    pool.arena.data.copy_(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8))
    return pool, np.random.default_rng(seed).permutation(pool.allocate(n))


def moved(
    pool: PagePool, source: tuple[np.ndarray, np.ndarray], target: tuple[np.ndarray, np.ndarray]
) -> torch.Tensor:
    """The arena's bytes after all source tokens were read and then written, one by one."""
    want = pool.arena.data.clone()
    for field in pool.format.fields:
        if field.rows is None:
            before = pool.format.view(pool.arena.data, field.name)
            after = pool.format.view(want, field.name)
            for page, row, to_page, to_row in zip(*source, *target, strict=True):
                after[to_page, to_row] = before[page, row]
    return want


def format_of(page_size: int, dims: tuple[int, int], dtype: torch.dtype) -> PageFormat:
    """A page with keys, values, positions, a side column and a summary."""
    dense = PageFormat.dense(page_size, *dims, dtype)
    more = Field("score", torch.float32, 2), Field("bounds", dtype, dims[0], rows=2)
    return PageFormat(page_size, (*dense.fields, *more))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    length=st.integers(0, 90),
    page_size=st.sampled_from([1, 4, 16]),
    dims=DIMS,
    dtype=DTYPES,
    at_once=st.booleans(),
    seed=st.integers(0, 100),
)
def test_tokens_move_with_all_their_fields_and_nothing_else_does(
    on_host: str,
    length: int,
    page_size: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    at_once: bool,
    seed: int,
) -> None:
    """Some tokens move to the front; or, all at once, they change places."""
    format = format_of(page_size, dims, dtype)
    pool, ids = pages_of(format, format.pages_for(length) + 1, seed)
    generator = np.random.default_rng(seed)
    if at_once:
        source, target = generator.permutation(length), np.arange(length)
    else:
        source = np.flatnonzero(generator.random(length) < 0.6)
        target = np.arange(source.size)
    places = [(ids[at // page_size], at % page_size) for at in (source, target)]

    want = moved(pool, *places)
    pool.move_tokens(*places, at_once=at_once)
    assert torch.equal(pool.arena.data, want)


@pytest.mark.parametrize("at_once", [False, True])
def test_many_tokens_move_alike_on_any_number_of_threads(on_host: str, at_once: bool) -> None:
    """Enough bytes for several threads, and for several pieces of each but where all change places
    at once."""
    format, n = format_of(16, (64, 128), torch.float32), 2500
    generator = np.random.default_rng(0)
    chosen = generator.permutation(n) if at_once else np.flatnonzero(generator.random(n) < 0.7)

    def places(ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids[at // 16], at % 16) for at in (chosen, np.arange(chosen.size))]

    def moves() -> torch.Tensor:
        pool, ids = pages_of(format, format.pages_for(n), seed=0)
        pool.move_tokens(*places(ids), at_once=at_once)
        return pool.arena.data

    pool, ids = pages_of(format, format.pages_for(n), seed=0)
    want = moved(pool, *places(ids))
    assert all(torch.equal(data, want) for data in on_threads(moves, 1, 2, 3))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(0,), (1,), (7,), (2, 3), (3, 0)]),
    page_size=st.sampled_from([1, 16, 64]),
    dims=DIMS,
    dtype=DTYPES,
    name=st.sampled_from(["k", "v", "position", "score", "bounds"]),
    seed=st.integers(0, 100),
)
def test_fields_of_pages_are_read_and_written_where_they_lie(
    on_host: str,
    shape: tuple[int, ...],
    page_size: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    name: str,
    seed: int,
) -> None:
    format = format_of(page_size, dims, dtype)
    pool, ids = pages_of(format, int(np.prod(shape)) + 2, seed)
    chosen = ids[: int(np.prod(shape))].reshape(shape)
    field = format.field(name)
    before = pool.gather(chosen, name)
    assert before.dtype == field.dtype
    assert before.shape == (*shape, field.rows_in(page_size), field.width)
    view = format.view(pool.arena.data, name)
    naive = [view[page].clone() for page in chosen.ravel().tolist()]
    for got, wanted in zip(before.reshape(-1, *before.shape[-2:]), naive, strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))

    values = torch.ones(chosen.size, field.width, before.shape[-2]).to(field.dtype).mT  # strided
    want = pool.arena.data.clone()
    for page in chosen.ravel().tolist():
        format.view(want, name)[page] = 1
    pool.scatter(chosen.ravel(), name, values)
    assert torch.equal(pool.arena.data, want)


def test_many_pages_are_read_and_written_alike_on_any_number_of_threads(on_host: str) -> None:
    format = PageFormat.dense(16, 64, 64, torch.float32)
    pool, ids = pages_of(format, 100, seed=0)
    values = torch.randn(100, 16, 64)

    def through() -> torch.Tensor:
        pool.clear(ids, ["v"])
        pool.scatter(ids, "v", values)
        return pool.gather(ids[::-1], "v")

    assert all(torch.equal(read, values.flip(0)) for read in on_threads(through, 1, 2, 3))


@pytest.mark.parametrize("n", [0, 1, 150])
def test_whole_pages_are_copied_between_arenas_on_any_number_of_threads(
    on_host: str, n: int
) -> None:
    format = format_of(16, (64, 32), torch.bfloat16)
    pool, ids = pages_of(format, n + 1, seed=0)

    def copied() -> torch.Tensor:
        other, others = pages_of(format, n + 3, seed=1)
        other.copy_from(pool, ids[:n], others[:n])
        return other.arena.data

    want, others = pages_of(format, n + 3, seed=1)
    view = want.words()
    for page, to in zip(ids[:n].tolist(), others[:n].tolist(), strict=True):
        view[to] = pool.words()[page]
    assert all(torch.equal(data, want.arena.data) for data in on_threads(copied, 1, 2, 3))


@pytest.mark.parametrize("row", [4, -1])
def test_places_that_there_are_not_are_refused(row: int) -> None:
    if native_module(warn=False) is None:
        pytest.skip("the extension is not built")
    pool, ids = pages_of(PageFormat.dense(4, 8, 8, torch.float32), 2, seed=0)
    before = pool.arena.data.clone()
    rows = np.int32([0, row])
    with pytest.raises(IndexError, match=r"lies outside of 0 \.\. 3"):
        pool.move_tokens((ids, rows), (ids, rows[::-1]))
    with pytest.raises(IndexError, match="lies outside"):
        pool.gather(np.int32([1 << 20]), "k")
    with pytest.raises(IndexError, match="lies outside"):
        pool.copy(ids[:1], np.int32([-1]))
    with pytest.raises(ValueError, match=r"k must be torch.float32 \[2, 4, 8\], got .*\[1, 4, 8\]"):
        pool.scatter(ids, "k", torch.zeros(1, 4, 8))
    assert torch.equal(pool.arena.data, before)
