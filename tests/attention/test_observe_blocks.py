"""Summaries of pages and blocks equal their definitions."""

from __future__ import annotations

import pytest
import torch

from tamis.attention import observe
from tests.attention import naive


@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_page_bounds_hold_every_key(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k = torch.randn(5, 16, 24).to(dtype)
    k_min, k_max = observe.page_bounds(k)
    assert k_min.dtype == k_max.dtype == torch.float32
    assert torch.equal(k_min, k.float().amin(1))
    assert torch.equal(k_max, k.float().amax(1))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_bound_scores_equal_the_formula_and_bound_every_product(
    group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    k, q = torch.randn(2, 7, 16, 24).to(dtype), torch.randn(2 * group, 24).to(dtype)
    k_min, k_max = (x.view(2, 7, 24) for x in observe.page_bounds(k.flatten(0, 1)))
    found = observe.bound_scores(q, k_min, k_max)
    repeated = [x.double().repeat_interleave(group, 0) for x in (k_min, k_max, k)]
    one = q.double()[:, None]
    want = torch.maximum(one * repeated[0], one * repeated[1]).sum(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
    products = (repeated[2] @ q.double()[:, None, :, None])[..., 0]
    assert (found.double() >= products.amax(-1) - 1e-5).all()


@pytest.mark.parametrize(("tokens", "block"), [(12, 4), (13, 4), (3, 8), (5, 1), (0, 4)])
def test_pooled_is_the_mean_of_each_block(tokens: int, block: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 3, 6).bfloat16()
    found = observe.pooled(x, block)
    want = [part.double().mean(0) for part in x.split(block)] if tokens else []
    assert found.dtype == torch.float32
    assert found.shape == (3, len(want), 6)
    for i, mean in enumerate(want):
        torch.testing.assert_close(found[:, i].double(), mean)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k must be \[pages, page_size, k_dim\]"):
        observe.page_bounds(torch.zeros(3, 0, 8))
    with pytest.raises(ValueError, match="a multiple of kv_heads"):
        observe.bound_scores(torch.zeros(3, 8), torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match=r"block >= 1, got .* 0"):
        observe.pooled(torch.zeros(3, 2, 8), 0)
