"""The pages that a query could match best, by every backend and instruction set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import observe, observe_native, observe_reference
from tamis.cache.format import UNIT, Field, PagedKV, PageFormat
from tamis.platform import native_module
from tests.attention import naive

PAGE = 4


@pytest.fixture(params=[*naive.BACKENDS, "triton"], scope="session")
def top_pages(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """One backend's and instruction set's implementation, Triton's interpreted without a GPU."""
    if request.param == "reference":
        return observe_reference.top_pages
    if request.param == "triton":
        return pytest.importorskip("tamis.attention.gpu.observe").top_pages
    return partial(observe_native.top_pages, native_module(), isa=request.param)


def bounded(
    lengths: list[list[int]], width: int, dtype: torch.dtype, extra: int = 0
) -> tuple[PagedKV, list[list[torch.Tensor]]]:
    """Pages that hold random bounds, in random order, and per head the bounds [2, pages, width].

    They are whole numbers, so that products are exact in any order of summation. Memory without
    bounds is NaN, and the last page's bounds are too: it is not to be looked at. `extra` bytes
    of another field lie before the bounds.
    """
    fields = (Field("least", dtype, width, 1), Field("most", dtype, width, 1))
    other = (Field("other", torch.uint8, extra),) if extra else ()
    format = PageFormat.dense(PAGE, width, width, dtype).extended((*other, *fields))
    counts = [[format.pages_for(length) for length in row] for row in lengths]
    total = sum(map(sum, counts))
    data = torch.full((max(1, total) * format.page_bytes,), 0xFF, dtype=torch.uint8)
    free = (torch.randperm(total) * (format.page_bytes // UNIT)).tolist()
    most = max((count for row in counts for count in row), default=0) + 1
    tables = torch.full((len(lengths), len(lengths[0]), most), 2**30, dtype=torch.int32)
    bounds = []
    for i, row in enumerate(counts):
        bounds.append([])
        for head, count in enumerate(row):
            ends = torch.randint(-8, 9, (2, count, width)).to(dtype).sort(0).values
            ids = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
            tables[i, head, :count] = ids.int()
            ends[:, -1:] = torch.nan
            for name, values in zip(("least", "most"), ends, strict=True):
                format.view(data, name)[ids, 0] = values
            bounds[-1].append(ends)
    return PagedKV(data, format, tables, torch.tensor(lengths, dtype=torch.int32)), bounds


def expected(q: torch.Tensor, bounds: torch.Tensor, count: int) -> list[int]:
    """By the definition: queries [group, width], bounds [2, pages, width], the last one always."""
    pages = bounds.shape[1]
    last = max(0, pages - 1)
    ends = bounds.double()[:, None, :last] * q.double()[:, None]
    score = ends.amax(0).sum(-1).amax(0).tolist()
    best = sorted(range(last), key=lambda page: (-score[page], page))[: count - 1]
    chosen = [*sorted(best), last]
    return chosen + [last + 1 + i for i in range(count - len(chosen))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 3).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 1200), min_size=n, max_size=n), min_size=1, max_size=3
        )
    ),
    group=st.integers(1, 7),
    width=st.sampled_from([8, 33, 64, 128]),
    dtype=st.sampled_from(list(naive.TOLERANCE)),
    count=st.integers(1, 40),
    full=st.none() | st.lists(st.integers(0, 150), min_size=9, max_size=9),
    seed=st.integers(0, 1000),
)
def test_they_are_the_last_and_those_of_largest_bounds(
    top_pages: Callable[..., torch.Tensor],
    heads: list[list[int]],
    group: int,
    width: int,
    dtype: torch.dtype,
    count: int,
    full: list[int] | None,
    seed: int,
) -> None:
    """Ragged heads, some of them empty; with full pages of another format before, or without."""
    torch.manual_seed(seed)
    kv, bounds = bounded(heads, width, dtype)
    q = torch.randint(-8, 9, (len(heads), len(heads[0]) * group, width)).to(dtype)
    before = None
    if full is not None:
        earlier = [[PAGE * full[3 * i + h] for h in range(len(row))] for i, row in enumerate(heads)]
        before, first = bounded(earlier, width, dtype, extra=3)
        for i, row in enumerate(heads):
            for head, length in enumerate(row):
                joined = torch.cat([first[i][head], bounds[i][head]], 1)
                if length and earlier[i][head]:  # not the last page: it has bounds
                    at = earlier[i][head] // PAGE - 1
                    joined[:, at] = torch.randint(-8, 9, (2, width)).to(dtype).sort(0).values
                    page = before.tables[i, head, at]
                    before.format.view(before.data, "least")[page, 0] = joined[0, at]
                    before.format.view(before.data, "most")[page, 0] = joined[1, at]
                bounds[i][head] = joined
    found = top_pages(q, kv, count, low="least", high="most", before=before)
    assert found.dtype == torch.int64
    for i, row in enumerate(bounds):
        for head, ends in enumerate(row):
            queries = q[i, head * group : (head + 1) * group]
            assert found[i, head].tolist() == expected(queries, ends, count)


@pytest.mark.usefixtures("extension")
def test_native_pages_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    kv, _ = bounded([[9000, 700], [4000, 8123]], 40, torch.bfloat16)
    for name in ("least", "most"):
        view = kv.format.view(kv.data, name)
        ids = torch.cat([kv.tables[0, 0, :2250], kv.tables[1, 0, :1000]]).long()
        view[ids, 0] = torch.randn(len(ids), 40).to(torch.bfloat16)
    q = torch.randn(2, 8, 40).to(torch.bfloat16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(observe.top_pages(q, kv, 99, low="least", high="most", backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4, 8)}, "top_pages needs q"),
        ({"q": torch.zeros(1, 3, 8)}, "top_pages needs q"),
        ({"q": torch.zeros(1, 4, 9)}, "'least' must be a field of one row of 9"),
        ({"q": torch.zeros(1, 4, 8).half()}, "'least' must be a field of one row of 8"),
        ({"high": "k"}, "'k' must be a field of one row"),
        ({"low": "none"}, "'none' must be a field"),
        ({"count": 0}, "count must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    kv, _ = bounded([[9, 3]], 8, torch.float32)
    arguments = {"q": torch.zeros(1, 4, 8), "count": 2, "low": "least", "high": "most"} | changes
    with pytest.raises(ValueError, match=message):
        observe.top_pages(kv=kv, **arguments)
