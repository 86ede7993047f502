"""Groups of numbers become few bits, never further off than half a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamis.attention.encoding import Quantized, packed_bytes, unpack
from tamis.attention.quantize import encode, quantize
from tests.instruction_sets import isas
from tests.threads import on_threads

HALVES = [torch.float16, torch.bfloat16]


def worst_error(x: Tensor, bits: int, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """The errors of `x` quantized along its last dimension, and the scales."""
    codes, scale, zero = quantize(x, -1, bits, half)
    assert int(codes.max()) < 2**bits
    return (codes.float() * scale.float() + zero.float() - x).abs(), scale.float()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_no_error_exceeds_half_a_scale(half: torch.dtype, bits: int, size: float) -> None:
    torch.manual_seed(bits)
    x = torch.randn(64, 16).clamp(-2, 2) * size + torch.randn(64, 1).clamp(-0.1, 0.1) * size
    error, scale = worst_error(x, bits, half)
    assert (error <= scale / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("half", HALVES)
def test_the_scale_is_the_range_over_the_levels_but_for_its_rounding(half: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    _, scale, zero = quantize(x, 1, 4, half)
    torch.testing.assert_close(zero.float(), x.amin(1, keepdim=True), rtol=0.01, atol=0)
    span = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    torch.testing.assert_close(scale.float(), span / 15, rtol=0.02, atol=0)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.14159, 1e-7, -1e-7, 6e4, -6e4])
def test_constant_groups_are_exact(half: torch.dtype, value: float) -> None:
    x = torch.full((3, 8), value).to(half).float()
    codes, scale, zero = quantize(x, 1, 2, half)
    assert codes.max() == 0
    assert scale.max() == 0
    assert torch.equal(zero.float().expand(3, 8), x)


def test_values_beyond_the_half_type_saturate() -> None:
    x = torch.tensor([[1e9, -1e9, 0.0, 2.0], [torch.inf, -torch.inf, 5.0, 5.0]])
    codes, scale, zero = quantize(x, 1, 8, torch.float16)
    read = codes.float() * scale.float() + zero.float()
    assert read.isfinite().all()
    assert (read[:, 0] > 6.5e4).all()
    assert (read[:, 1] < -6.5e4).all()


def test_bf16_reaches_far() -> None:
    x = torch.tensor([[1e30, -1e30, 0.0, 5e29]])
    error, scale = worst_error(x, 8, torch.bfloat16)
    assert (error <= scale / 2 * (1 + 1e-4)).all()


# --- pages ----------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_fields_of_a_page_are_those_of_its_groups() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, 12)
    for rows in (Quantized(3, 4, "tokens"), Quantized(3, 4, "channels")):
        codes, scale, zero = encode(x, rows, torch.float16, backend="reference")
        assert codes.shape == (3, 8, packed_bytes(12, 3))
        assert scale.shape == zero.shape == ((3, 2, 12) if rows.along == "tokens" else (3, 8, 3))
        for page, token, channel in ((0, 0, 0), (1, 5, 7), (2, 7, 11)):
            if rows.along == "tokens":
                first = token // 4 * 4
                group, at = x[page, first : first + 4, channel], (page, token // 4, channel)
                place = token - first
            else:
                first = channel // 4 * 4
                group, at = x[page, token, first : first + 4], (page, token, channel // 4)
                place = channel - first
            wanted = quantize(group, 0, 3, torch.float16)
            assert unpack(codes, 3, 12)[page, token, channel] == wanted[0][place]
            assert (scale[at], zero[at]) == (wanted[1], wanted[2])


@pytest.fixture(params=isas(), scope="module")
def isa(request: pytest.FixtureRequest) -> str:
    """An instruction set of the compiled kernels."""
    return request.param


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lead=st.sampled_from([(), (1,), (2, 3), (0, 2)]),
    groups=st.integers(1, 4),
    group=st.sampled_from([1, 4, 16, 31, 32, 64]),
    width=st.integers(1, 256),
    along=st.sampled_from(["tokens", "channels"]),
    bits=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    half=st.sampled_from(HALVES),
    kind=st.sampled_from(["normal", "tiny", "huge", "constant", "offset", "infinite"]),
    seed=st.integers(0, 100),
)
def test_kernels_give_the_codes_and_scales_of_the_reference(
    isa: str,
    lead: tuple[int, ...],
    groups: int,
    group: int,
    width: int,
    along: str,
    bits: int,
    dtype: torch.dtype,
    half: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shape = (groups * group, width) if along == "tokens" else (width % 9 + 1, groups * group)
    x = torch.randn(*lead, *shape)
    if kind == "constant":
        x = x.mean().expand_as(x)
    elif kind == "infinite":
        x = x.where(x.abs() < 2, torch.inf * x.sign())
    else:
        x = x * {"tiny": 1e-6, "huge": 2e4}.get(kind, 1.0) + 100 * (kind == "offset")
    x, rows = x.to(dtype), Quantized(bits, group, along)  # type: ignore[arg-type]
    want = encode(x, rows, half, backend="reference")
    got = encode(x, rows, half, backend="native", isa=isa)
    for ours, wanted in zip(got, want, strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("along", ["tokens", "channels"])
def test_many_pages_are_encoded_alike_on_any_number_of_threads(isa: str, along: str) -> None:
    torch.manual_seed(0)
    rows = Quantized(4, 32, along)  # type: ignore[arg-type]
    # As the engine hands them over: a part of each head's pages.
    x = torch.randn(2, 9, 64, 64).bfloat16()[:, 1:]
    want = encode(x, rows, torch.bfloat16, backend="reference")

    def encoded() -> tuple[Tensor, Tensor, Tensor]:
        return encode(x, rows, torch.bfloat16, backend="native", isa=isa)

    for got in on_threads(encoded, 1, 2, 3):
        assert all(torch.equal(*both) for both in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(6, 8), r"groups of 4 tokens cannot be made of torch.float32 \[6, 8\]"),
        (torch.zeros(8, 8).double(), r"cannot be made of torch.float64"),
    ],
)
def test_what_has_no_groups_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(x, Quantized(4, 4, "tokens"), torch.float16)
