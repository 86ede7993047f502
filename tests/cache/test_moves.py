"""New tokens land in the pages they belong to, and nowhere else, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.cache.format import Field, PageFormat
from tamis.cache.moves import append
from tamis.platform import native_module, triton_installed


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
