"""Quest reads the pages whose keys could match the query best."""

from __future__ import annotations

import math

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.select.quest import Quest
from tests.methods.decode import NaiveDecodeView, decode_view


def step(
    seed: int, method: Quest, *, lengths: tuple[int, ...] = (30, 30), group: int = 2, layer: int = 2
) -> NaiveDecodeView:
    torch.manual_seed(seed)
    q = torch.randn(group * len(lengths), 8)
    k = torch.randn(len(lengths), max(lengths), 8)
    return decode_view(q, k, lengths=list(lengths), layer=layer, method=method)


def largest_bounds(view: NaiveDecodeView, head: int, count: int) -> set[int]:
    """The last page, and those whose channel-wise bound is largest for any of the query heads."""
    length, size = int(view.lengths[head]), view.page_size
    group = len(view.q) // len(view.k)
    last = (length - 1) // size
    bounds = {}
    for page in range(last):
        keys = view.k[head, page * size : (page + 1) * size]
        bounds[page] = max(
            sum(
                max(float(q[i] * keys[:, i].min()), float(q[i] * keys[:, i].max()))
                for i in range(len(q))
            )
            for q in view.q[head * group : (head + 1) * group]
        )
    return {last, *sorted(bounds, key=lambda page: -bounds[page])[: count - 1]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("lengths", [(30, 30), (32, 32), (29, 13, 33), (5, 40)])
def test_it_reads_the_pages_of_largest_bound_and_the_last(
    seed: int, group: int, lengths: tuple[int, ...]
) -> None:
    method = Quest(pages=3)
    view = step(seed, method, lengths=lengths, group=group)
    selection = method.select(view)
    assert selection is not None
    assert selection.pages is not None
    for head, length in enumerate(lengths):
        there = math.ceil(length / view.page_size)
        chosen = [page for page in selection.pages[head].tolist() if page < there]
        assert chosen == selection.pages[head].tolist()[: len(chosen)], "others come after its own"
        assert chosen == sorted(largest_bounds(view, head, 3))


def test_a_share_of_the_pages_is_rounded_up() -> None:
    method = Quest(pages=0.3)
    selection = method.select(step(0, method))  # 8 pages
    assert selection is not None
    assert selection.pages is not None
    assert selection.pages.shape == (2, 3)


@pytest.mark.parametrize("pages", [8, 100, 1.0])
def test_enough_pages_are_all_pages(pages: int | float) -> None:
    method = Quest(pages=pages)
    assert method.select(step(0, method)) is None


def test_the_first_layers_read_everything() -> None:
    method = Quest(pages=1)
    assert method.select(step(0, method, layer=1)) is None
    assert method.select(step(0, method, layer=2)) is not None


def test_one_page_is_the_last() -> None:
    method = Quest(pages=1)
    selection = method.select(step(0, method, lengths=(30, 9)))
    assert selection is not None
    assert selection.pages is not None
    assert selection.pages.tolist() == [[7], [2]]


def test_one_token_is_read() -> None:
    method = Quest(pages=1)
    assert method.select(step(0, method, lengths=(1, 1))) is None


@pytest.mark.parametrize("wrong", [{"pages": 0}, {"pages": -0.5}, {"skip_layers": -1}])
def test_parameters_out_of_range_are_plan_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        Quest(**wrong)
