"""A decode over narrowed page tables reads the chosen pages and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention.narrow import narrowed
from tamis.cache.format import PagedKV, PageFormat
from tamis.platform import native_module

PUBLIC = ["reference", *(["native"] if native_module(warn=False) else [])]


def paged(lengths: list[list[int]], size: int) -> PagedKV:
    """Tables of distinct ids, with a spare column."""
    most = -(-max(map(max, lengths)) // size) + 1
    count = len(lengths) * len(lengths[0]) * most
    tables = torch.randperm(count, dtype=torch.int32).view(len(lengths), len(lengths[0]), most)
    format = PageFormat.dense(size, 8, 8, torch.float32)
    return PagedKV(torch.zeros(0), format, tables, torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("backend", PUBLIC)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), size=st.sampled_from([1, 4, 16]), seed=st.integers(0, 1000))
def test_pages_that_a_head_has_are_read_in_order(
    backend: str, data: st.DataObject, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12)))
    lengths = torch.randint(0, 60, shape[:2]).tolist()
    kv = paged(lengths, size)
    chosen = torch.rand(*shape[:2], 40).argsort(-1)[..., : shape[2]].sort(-1).values
    before = torch.randint(0, 9, shape[:2]) if data.draw(st.booleans()) else None
    found = narrowed(kv, chosen, before, backend=backend)
    assert found.tables.shape == chosen.shape
    for row in range(shape[0]):
        for head in range(shape[1]):
            skip = 0 if before is None else int(before[row, head])
            tokens = [
                (int(kv.tables[row, head, token // size]), token % size)
                for page in chosen[row, head].tolist()
                for token in range(max(0, page - skip) * size, (page - skip + 1) * size)
                if token < lengths[row][head]
            ]
            read = int(found.lengths[row, head])
            ids = found.tables[row, head]
            assert [(int(ids[i // size]), i % size) for i in range(read)] == tokens


@pytest.mark.parametrize("backend", PUBLIC)
def test_strided_tables_and_choices(backend: str) -> None:
    kv = paged([[9, 9], [5, 9]], 4)
    chosen = torch.tensor([[0, 1, 2], [1, 2, 3]]).t()[None].expand(2, -1, -1)[..., :1]
    with pytest.raises(ValueError, match=r"chosen pages must be int64 \[2, 2, m\]"):
        narrowed(kv, chosen, backend=backend)
    found = narrowed(kv, torch.tensor([[0, 2]]).expand(2, 2, -1), backend=backend)
    assert found.lengths.tolist() == [[5, 5], [4, 5]]


@pytest.mark.parametrize(
    ("chosen", "before", "message"),
    [
        (torch.zeros(1, 2, 3).int(), None, "chosen pages must be int64"),
        (torch.zeros(1, 3, 3).long(), None, "chosen pages must be int64"),
        (torch.zeros(1, 2, 3).long(), torch.zeros(2).long(), "before must be int64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    chosen: torch.Tensor, before: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        narrowed(paged([[9, 9]], 4), chosen, before)
