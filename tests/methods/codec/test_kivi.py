"""KIVI stores keys per channel and values per token, in groups, as the paper defines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.codec.kivi import KIVI
from tests.methods.codec.pages import assert_declared, bytes_per_token
from tests.methods.layer import NaiveLayerView, layer_view

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pages(
    seed: int, heads: int, n: int, size: int, k_dim: int, v_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, NaiveLayerView]:
    """Random pages of keys and values, keys with an outlier channel, and the view around them."""
    torch.manual_seed(seed)
    k = torch.randn(heads, n, size, k_dim)
    k[..., 1] = k[..., 1] * 20 + 50
    k, v = k.to(dtype), torch.randn(heads, n, size, v_dim).to(dtype)
    view = layer_view(k.flatten(1, 2), v.flatten(1, 2), torch.randn(4, heads, k_dim))
    return k, v, view


def naive_group(group: list[float], bits: int) -> list[float]:
    """Equation of the paper for one group, with numbers of any precision."""
    low, high = min(group), max(group)
    step = (high - low) / (2**bits - 1)
    return [round((x - low) / step) * step + low for x in group]


@pytest.mark.parametrize(("seed", "bits", "size", "group"), [(0, 2, 8, 4), (1, 4, 16, 8)])
def test_reads_what_the_formula_gives(seed: int, bits: int, size: int, group: int) -> None:
    """But for the 16-bit rounding of scale and zero-point, which may move a code by one."""
    k, v, view = pages(seed, 2, 2, size, 16, 8, torch.float32)
    method = KIVI(bits=bits, group_size=group)
    fields = method.encode(k, v, view)
    k_read, v_read = method.decode(fields)
    same = total = 0
    for head in range(2):
        for page in range(2):
            for start in range(0, size, group):
                for channel in range(16):
                    at = (head, page, slice(start, start + group), channel)
                    naive = torch.tensor(naive_group(k[at].tolist(), bits))
                    step = fields["k_scale"][head, page, start // group, channel].float()
                    off = (k_read[at] - naive).abs()
                    assert (off <= step * 1.02).all()
                    same, total = same + int((off < step * 0.05).sum()), total + group
            for token in range(size):
                for start in range(0, 8, group):
                    at = (head, page, token, slice(start, start + group))
                    naive = torch.tensor(naive_group(v[at].tolist(), bits))
                    step = fields["v_scale"][head, page, token, start // group].float()
                    off = (v_read[at] - naive).abs()
                    assert (off <= step * 1.02).all()
                    same, total = same + int((off < step * 0.05).sum()), total + group
    assert same >= 0.98 * total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_error_exceeds_half_a_scale(bits: int, dtype: torch.dtype) -> None:
    k, v, view = pages(bits, 2, 3, 16, 24, 32, dtype)
    method = KIVI(bits=bits, group_size=8)
    fields = method.encode(k, v, view)
    assert_declared(fields, method.columns(16, 24, 32, dtype), (2, 3), 16)
    k_read, v_read = method.decode(fields)
    assert k_read.dtype == v_read.dtype == torch.float32
    k_step = fields["k_scale"].float().repeat_interleave(8, dim=2)
    v_step = fields["v_scale"].float().repeat_interleave(8, dim=3)
    assert ((k_read - k.float()).abs() <= k_step / 2 * (1 + 1e-3)).all()
    assert ((v_read - v.float()).abs() <= v_step / 2 * (1 + 1e-3)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_constant_channels_of_keys_and_constant_tokens_of_values_are_exact(
    dtype: torch.dtype,
) -> None:
    k, v, view = pages(0, 2, 2, 16, 8, 16, dtype)
    k = k[:, :, :1].expand_as(k).contiguous()
    v = v[..., :1].expand_as(v).contiguous()
    method = KIVI(group_size=16)
    k_read, v_read = method.decode(method.encode(k, v, view))
    assert torch.equal(k_read, k.float())
    assert torch.equal(v_read, v.float())


def test_an_outlier_channel_of_keys_costs_the_other_channels_nothing() -> None:
    k, v, view = pages(0, 1, 1, 32, 8, 32, torch.float32)
    calm = k.clone()
    calm[..., 1] = 0
    method = KIVI()
    read, calm_read = (method.decode(method.encode(x, v, view))[0] for x in (k, calm))
    others = [0, *range(2, 8)]
    assert torch.equal(read[..., others], calm_read[..., others])


def test_pages_are_read_alike_one_by_one_or_together() -> None:
    k, v, view = pages(3, 2, 4, 32, 16, 32, torch.bfloat16)
    method = KIVI()
    fields = method.encode(k, v, view)
    whole = method.decode(fields)
    for page in range(4):
        one = method.decode({name: x[:, page : page + 1] for name, x in fields.items()})
        assert torch.equal(one[0], whole[0][:, page : page + 1])
        assert torch.equal(one[1], whole[1][:, page : page + 1])


def test_extreme_values_stay_finite() -> None:
    k, v, view = pages(0, 1, 1, 32, 8, 32, torch.float16)
    k[..., 0, :], k[..., 1, :] = 65504, -65504
    v[..., 0] = -65504
    method = KIVI()
    k_read, v_read = method.decode(method.encode(k, v, view))
    assert k_read.isfinite().all()
    assert v_read.isfinite().all()
    torch.testing.assert_close(k_read[..., 0, :], k[..., 0, :].float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_bits_take_48_bytes_per_token_of_64_channels(dtype: torch.dtype) -> None:
    assert bytes_per_token(KIVI().columns(64, 64, 64, dtype), 64) == 48


@pytest.mark.parametrize(("bits", "group", "k_dim", "v_dim"), [(2, 32, 128, 128), (4, 16, 96, 32)])
def test_bytes_are_those_of_the_formula(bits: int, group: int, k_dim: int, v_dim: int) -> None:
    columns = KIVI(bits=bits, group_size=group).columns(64, k_dim, v_dim, torch.bfloat16)
    assert bytes_per_token(columns, 64) == (k_dim + v_dim) * (bits + 32 / group) / 8


@pytest.mark.parametrize(("bits", "words"), [(1, 3), (2, 5), (3, 8), (4, 10), (8, 20)])
def test_rows_of_codes_fill_whole_words(bits: int, words: int) -> None:
    columns = {c.name: c for c in KIVI(bits, group_size=8).columns(64, 40, 40, torch.bfloat16)}
    assert columns["k_codes"].width == columns["v_codes"].width == 2 * words


@pytest.mark.parametrize(
    ("method", "sizes", "message"),
    [
        (KIVI(), (48, 64, 64), r"kivi\(\).*48 tokens.*group_size=16 would"),
        (KIVI(), (64, 80, 80), r"80 channels; group_size=16 would"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_would(
    method: KIVI, sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        method.columns(*sizes, torch.bfloat16)


@pytest.mark.parametrize(
    "wrong", [{"bits": 5}, {"bits": 16}, {"group_size": 0}, {"residual": -1}, {"residual": 1.5}]
)
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        KIVI(**wrong)  # type: ignore[arg-type]
