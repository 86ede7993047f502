"""GEAR mends KIVI's error by a low-rank matrix and exact outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.codec.gear import GEAR
from tamis.methods.codec.kivi import KIVI
from tests.methods.codec.pages import assert_declared, bytes_per_token
from tests.methods.layer import NaiveLayerView, layer_view

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pages(
    seed: int, dtype: torch.dtype = torch.float32, *, size: int = 32, dim: int = 32
) -> tuple[Tensor, Tensor, NaiveLayerView]:
    """Random pages [2, 3, size, dim] with outlier channels in keys and single outliers in both."""
    torch.manual_seed(seed)
    k, v = torch.randn(2, 2, 3, size, dim)
    k[..., 3] += 8
    for x in (k, v):
        x += (torch.rand_like(x) < 0.01) * torch.randn_like(x) * 15
    k, v = k.to(dtype), v.to(dtype)
    return k, v, layer_view(k.flatten(1, 2), v.flatten(1, 2), torch.randn(4, 2, dim))


def naive_outliers(page: Tensor, count: int, dim: int) -> tuple[set[tuple[int, int]], Tensor]:
    """Places of a page's [tokens, channels] elements farthest from the median of their column
    (dim 0) or row (dim 1), and the page with that median in their place."""
    vectors = page if dim == 1 else page.T
    medians = [sorted(vector.tolist())[(len(vector) - 1) // 2] for vector in vectors]
    far = sorted(
        (
            (-abs(float(page[i, j]) - medians[i if dim == 1 else j]), i, j)
            for i in range(page.shape[0])
            for j in range(page.shape[1])
        ),
    )[:count]
    filled = page.clone()
    for _, i, j in far:
        filled[i, j] = medians[i if dim == 1 else j]
    return {(i, j) for _, i, j in far}, filled


@pytest.mark.parametrize("seed", [0, 1])
def test_reads_outliers_as_they_were_and_the_rest_as_backbone_plus_low_rank(seed: int) -> None:
    """Against loops for the outliers, KIVI for the backbone, and the best possible `L`."""
    k, v, view = pages(seed)
    method = GEAR(bits=2, group_size=16, rank=3)
    read = dict(zip("kv", method.decode(method.encode(k, v, view)), strict=True))
    for head in range(2):
        for page in range(3):
            count = round(0.02 * 32 * 32)
            k_places, k_filled = naive_outliers(k[head, page], count, 0)
            v_places, v_filled = naive_outliers(v[head, page], count, 1)
            backbone = KIVI(bits=2, group_size=16)
            filled = (k_filled[None, None], v_filled[None, None])
            quantized = backbone.decode(backbone.encode(*filled, view))
            for name, x, places, dense in (
                ("k", k, k_places, quantized[0][0, 0]),
                ("v", v, v_places, quantized[1][0, 0]),
            ):
                x, got = x[head, page], read[name][head, page]
                error = x - dense
                for i, j in places:
                    assert abs(got[i, j] - x[i, j]) <= 1e-3 * abs(x[i, j])  # rounded to fp16
                    error[i, j] = 0
                u, s, vh = torch.linalg.svd(error)
                best = (error - (u[:, :3] * s[:3]) @ vh[:3]).norm()
                assert (got - x).norm() <= 1.06 * best


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_less_than_kivi_at_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    k, v, view = pages(bits, dtype)
    gear, kivi = GEAR(bits=bits, group_size=32), KIVI(bits=bits, group_size=32)
    for x, ours, theirs in zip(
        (k, v),
        gear.decode(gear.encode(k, v, view)),
        kivi.decode(kivi.encode(k, v, view)),
        strict=True,
    ):
        assert (ours - x.float()).norm() < 0.7 * (theirs - x.float()).norm()


def test_each_part_helps() -> None:
    k, v, view = pages(7)
    errors = [
        (method.decode(method.encode(k, v, view))[0] - k).norm()
        for method in (
            KIVI(group_size=32),
            GEAR(bits=2, group_size=32, sparsity=0.0),
            GEAR(bits=2, group_size=32),
            GEAR(bits=2, group_size=32, rank=8),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_a_full_rank_mends_everything() -> None:
    k, v, view = pages(0, size=16, dim=16)
    method = GEAR(bits=2, group_size=16, rank=16)
    k_read, v_read = method.decode(method.encode(k, v, view))
    torch.testing.assert_close(k_read, k, rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(v_read, v, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.02])
def test_fields_are_the_declared_ones_and_pages_are_independent(
    dtype: torch.dtype, sparsity: float
) -> None:
    k, v, view = pages(5, dtype)
    method = GEAR(group_size=16, sparsity=sparsity)
    fields = method.encode(k, v, view)
    assert_declared(fields, method.columns(32, 32, 32, dtype), (2, 3), 32)
    alone = method.encode(k[:, 1:2], v[:, 1:2], view)
    whole = method.decode(fields)
    for one, all_pages in zip(method.decode(alone), whole, strict=True):
        torch.testing.assert_close(one, all_pages[:, 1:2])
    again = method.decode(method.encode(k, v, view))
    assert torch.equal(again[0], whole[0])
    assert torch.equal(again[1], whole[1])


def test_constant_pages_are_exact() -> None:
    k, v, view = pages(0, torch.bfloat16)
    k, v = torch.full_like(k, 3.140625), torch.zeros_like(v)
    method = GEAR(group_size=32)
    k_read, v_read = method.decode(method.encode(k, v, view))
    assert torch.equal(k_read, k.float())
    assert torch.equal(v_read, v.float())


def test_extreme_values_stay_finite() -> None:
    k, v, view = pages(0, torch.float16)
    # Zeros lie halfway between two codes: the error has rank 1 and is larger than fp16 in norm.
    k[:], k[..., 0, :], k[..., 1, :] = 0, 65504, -65504
    v[..., 0] = -65504
    method = GEAR(bits=2, group_size=32)
    k_read, v_read = method.decode(method.encode(k, v, view))
    assert k_read.isfinite().all()
    assert v_read.isfinite().all()


def test_wide_pages_number_their_outliers_with_more_bits() -> None:
    k, v, view = pages(0, size=256, dim=256)
    method = GEAR(group_size=64)
    columns = {c.name: c for c in method.columns(256, 256, 256, torch.float32)}
    assert columns["k_places"].dtype == torch.int32
    fields = method.encode(k[:, :1], v[:, :1], view)
    assert fields["k_places"].max() > 2**15
    error = method.decode(fields)[0] - k[:, :1]
    exact = error.flatten(2).gather(2, fields["k_places"].squeeze(2).long())
    assert exact.abs().max() < 0.02


@pytest.mark.parametrize(("bits", "rank", "sparsity"), [(4, 4, 0.02), (2, 2, 0.0), (2, 8, 0.1)])
def test_bytes_are_those_of_the_formula(bits: int, rank: int, sparsity: float) -> None:
    method = GEAR(bits=bits, rank=rank, sparsity=sparsity)
    columns = method.columns(64, 64, 128, torch.bfloat16)
    backbone = (64 + 128) * (bits + 32 / 64) / 8
    low_rank = 2 * rank * (2 + (64 + 128) / 64)
    outliers = 4 * (round(sparsity * 64 * 64) + round(sparsity * 64 * 128)) / 64
    assert bytes_per_token(columns, 64) == pytest.approx(backbone + low_rank + outliers)


def test_a_rank_beyond_the_page_is_refused() -> None:
    with pytest.raises(PlanError, match=r"gear\(rank=33\).*rank must be at most 32"):
        GEAR(rank=33).columns(64, 32, 64, torch.bfloat16)
    with pytest.raises(PlanError, match=r"gear\(\).*group_size=32 would"):
        GEAR().columns(64, 32, 32, torch.bfloat16)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"sparsity": 0.6}, {"sparsity": -0.1}, {"bits": 5}])
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        GEAR(**wrong)  # type: ignore[arg-type]
