"""Every key finds the most similar of others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention.nearest import nearest
from tests.instruction_sets import isas
from tests.threads import on_threads


@pytest.fixture(params=[("reference", None), *(("native", isa) for isa in isas())], scope="module")
def how(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """A backend, and where it is native an instruction set."""
    return dict(zip(("backend", "isa"), request.param, strict=True))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([1, 5, 96, 97, 300]),
    m=st.sampled_from([1, 3, 16, 255, 257, 600]),
    dim=st.integers(1, 256),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    sign=st.sampled_from([1, -1]),
    seed=st.integers(0, 100),
)
def test_the_most_similar_is_found(
    how: dict, n: int, m: int, dim: int, dtype: torch.dtype, sign: int, seed: int
) -> None:
    """With -1 no similarity is positive."""
    torch.manual_seed(seed)
    k, among = torch.randn(n, dim).abs().to(dtype), sign * torch.randn(m, dim).abs().to(dtype)
    similarity, index = nearest(k, among, **how)
    cosines = torch.nn.functional.cosine_similarity(
        k.double()[:, None], among.double()[None], dim=-1, eps=1e-24
    )
    assert similarity.dtype == torch.float32
    assert index.dtype == torch.int64
    torch.testing.assert_close(similarity.double(), cosines.amax(1), rtol=0, atol=1e-5)
    found = cosines.gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(found, cosines.amax(1), rtol=0, atol=1e-5)


def test_of_equals_the_first_is_found_whatever_their_length(how: dict) -> None:
    among = torch.randn(700, 32, generator=torch.Generator().manual_seed(0))
    among[300], among[650] = among[40] * 4, among[40] * 2
    similarity, index = nearest(among[[300, 40, 650]].bfloat16(), among.bfloat16(), **how)
    assert index.tolist() == [40, 40, 40]
    torch.testing.assert_close(similarity, torch.ones(3))


def test_nothing_finds_nothing_and_zeros_are_like_nothing(how: dict) -> None:
    similarity, index = nearest(torch.zeros(0, 8), torch.ones(3, 8), **how)
    assert similarity.shape == index.shape == (0,)
    assert nearest(torch.zeros(1, 8), torch.ones(3, 8), **how)[0].tolist() == [0]


def test_any_number_of_threads_finds_the_same(how: dict) -> None:
    torch.manual_seed(0)
    k, among = torch.randn(500, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    first, *others = on_threads(lambda: nearest(k, among, **how), 1, 2, 3)
    for other in others:
        assert all(torch.equal(*both) for both in zip(first, other, strict=True))


def test_keys_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must fit, got torch.float32 \[2, 8\] and .*\[0, 8\]"):
        nearest(torch.zeros(2, 8), torch.zeros(0, 8))
    with pytest.raises(ValueError, match="must fit"):
        nearest(torch.zeros(2, 8), torch.zeros(3, 8).bfloat16())
