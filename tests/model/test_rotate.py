"""Keys turn by angles as their definition says, on every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.model.rotate import rotate
from tests.instruction_sets import isas
from tests.threads import on_threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=[("reference", None), *(("native", isa) for isa in isas())], scope="module")
def how(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """A backend, and where it is native an instruction set."""
    return dict(zip(("backend", "isa"), request.param, strict=True))


def naive(
    k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, angle: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The definition, pair by pair in fp64."""
    out, n = k.double(), cos.shape[1]
    cos, sin = cos.double()[angle], sin.double()[angle]
    for i in range(n):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
        a, b = k[..., first].double(), k[..., second].double()
        out[..., first] = a * cos[:, i] - b * sin[:, i]
        out[..., second] = b * cos[:, i] + a * sin[:, i]
    return out


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lead=st.sampled_from([(), (2,), (2, 3), (0,)]),
    tokens=st.integers(1, 40),
    pairs=st.integers(1, 128),
    rest=st.sampled_from([0, 0, 1, 32]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    seed=st.integers(0, 100),
)
def test_pairs_turn_and_the_rest_stays(
    how: dict,
    lead: tuple[int, ...],
    tokens: int,
    pairs: int,
    rest: int,
    dtype: torch.dtype,
    interleaved: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    k = torch.randn(*lead, tokens, 2 * pairs + rest).to(dtype)
    phase = 6 * torch.rand(5, pairs)
    angle = torch.randint(0, 5, (tokens,))
    arguments = k, phase.cos(), phase.sin(), angle
    got = rotate(*arguments, interleaved=interleaved, **how)
    assert got.dtype == dtype
    assert torch.equal(got[..., 2 * pairs :], k[..., 2 * pairs :])
    want = naive(*arguments, interleaved)
    # One rounding to the keys' type, and those of fp32 before it.
    slack = 2 * EPS[torch.float32] * (k.double().abs().max() if k.numel() else 0) + 2.0**-25
    assert ((got.double() - want).abs() <= EPS[dtype] * want.abs() + 2 * slack).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_many_keys_turn_alike_on_any_number_of_threads(how: dict, interleaved: bool) -> None:
    torch.manual_seed(0)
    k, phase = torch.randn(2, 700, 64).bfloat16(), torch.rand(700, 32)
    arguments = k.transpose(0, 1).contiguous().transpose(0, 1), phase.cos(), phase.sin()

    def turned() -> torch.Tensor:
        return rotate(*arguments, torch.arange(700), interleaved=interleaved, **how)

    first, *others = on_threads(turned, 1, 2, 3)
    assert all(torch.equal(first, other) for other in others)
    one = rotate(
        k[1, 699:],
        phase[699:].cos(),
        phase[699:].sin(),
        torch.tensor([0]),
        interleaved=interleaved,
        **how,
    )
    assert torch.equal(first[1, 699:], one)
