"""ThinK keeps the key channels that weigh most in the last queries' scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.codec.think import ThinK
from tamis.methods.views import Needs
from tests.methods.codec.pages import assert_declared, bytes_per_token
from tests.methods.layer import NaiveLayerView, layer_view


def pages(
    seed: int, kv_heads: int, group: int, k_dim: int = 10, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, NaiveLayerView]:
    """Random pages [kv_heads, 3, 8, dim], and 40 last queries, with channels of unlike size."""
    torch.manual_seed(seed)
    k = (torch.randn(kv_heads, 3, 8, k_dim) * torch.rand(kv_heads, 1, 1, k_dim)).to(dtype)
    v = torch.randn(kv_heads, 3, 8, 6).to(dtype)
    q = (torch.randn(40, kv_heads * group, k_dim) * torch.rand(kv_heads * group, k_dim)).to(dtype)
    return k, v, layer_view(k.flatten(1, 2), v.flatten(1, 2), q)


def naive_channels(k: Tensor, q: Tensor, kept: int) -> list[set[int]]:
    """Per KV head the channels whose outer products have the largest Frobenius norms."""
    chosen = []
    group = q.shape[1] // len(k)
    for head in range(len(k)):
        keys = k[head].flatten(0, 1)
        scores = [0.0] * keys.shape[1]
        for channel in range(keys.shape[1]):
            for query_head in range(head * group, (head + 1) * group):
                outer = q[:, query_head, channel][:, None] * keys[None, :, channel]
                scores[channel] += math.sqrt(sum(float(x) ** 2 for x in outer.flatten()))
        ranked = sorted(range(len(scores)), key=lambda channel: -scores[channel])
        chosen.append(set(ranked[:kept]))
    return chosen


@pytest.mark.parametrize(("seed", "kv_heads", "group"), [(0, 1, 1), (1, 2, 2), (2, 3, 4)])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_keeps_the_channels_of_the_papers_formula(
    seed: int, kv_heads: int, group: int, window: int
) -> None:
    k, v, view = pages(seed, kv_heads, group)
    method = ThinK(window=window)
    k_read, v_read = method.decode(method.encode(k, v, view))
    assert torch.equal(v_read, v)
    for head, channels in enumerate(naive_channels(k, view.q[-window:], 6)):
        for channel in range(10):
            expected = k[head, ..., channel] if channel in channels else torch.zeros(3, 8)
            assert torch.equal(k_read[head, ..., channel], expected)


def test_products_with_the_keys_are_those_of_the_sliced_query_and_keys() -> None:
    k, v, view = pages(0, 2, 1, k_dim=16)
    method = ThinK(ratio=0.5)
    fields = method.encode(k, v, view)
    k_read, _ = method.decode(fields)
    for head in range(2):
        channels = fields["k_mask"][head, 0, 0].bool()
        query = view.q[-1, head]
        sliced = fields["k_kept"][head] @ query[channels]
        torch.testing.assert_close(k_read[head] @ query, sliced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pruning_nothing_is_exact(dtype: torch.dtype) -> None:
    k, v, view = pages(0, 2, 2, dtype=dtype)
    method = ThinK(ratio=0.0)
    fields = method.encode(k, v, view)
    assert_declared(fields, method.columns(8, 10, 6, dtype), (2, 3), 8)
    k_read, v_read = method.decode(fields)
    assert torch.equal(k_read, k.float())
    assert torch.equal(v_read, v.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_channels_are_chosen_once_and_kept_exactly(dtype: torch.dtype) -> None:
    k, v, view = pages(0, 2, 2, dtype=dtype)
    method = ThinK()
    first = method.encode(k, v, view)
    assert_declared(first, method.columns(8, 10, 6, dtype), (2, 3), 8)
    later, _, _ = pages(9, 2, 2, dtype=dtype)
    second = method.encode(later[:, :1], v[:, :1], view)
    assert torch.equal(second["k_mask"], first["k_mask"][:, :1])
    read = method.decode(second)[0]
    assert torch.equal(read, later[:, :1].float() * first["k_mask"][:, :1])


def test_pages_are_read_alike_one_by_one_or_together() -> None:
    k, v, view = pages(4, 2, 2)
    method = ThinK()
    fields = method.encode(k, v, view)
    whole = method.decode(fields)[0]
    for page in range(3):
        one = method.decode({name: x[:, page : page + 1] for name, x in fields.items()})[0]
        assert torch.equal(one, whole[:, page : page + 1])


def test_of_equal_channels_the_first_stay() -> None:
    k, v, view = pages(0, 1, 1)
    k = torch.ones_like(k)
    view = layer_view(k.flatten(1, 2), v.flatten(1, 2), torch.ones_like(view.q))
    mask = ThinK().encode(k, v, view)["k_mask"]
    assert mask[0, 0, 0].tolist() == [1] * 6 + [0] * 4


@pytest.mark.parametrize(("ratio", "k_dim", "kept"), [(0.4, 64, 38), (0.4, 128, 76), (0.9, 10, 1)])
def test_bytes_are_those_of_the_kept_channels_the_values_and_a_mask(
    ratio: float, k_dim: int, kept: int
) -> None:
    columns = ThinK(ratio=ratio).columns(64, k_dim, 32, torch.bfloat16)
    assert bytes_per_token(columns, 64) == 2 * (kept + 32) + k_dim / 64


def test_asks_for_its_window_and_names_its_dependence_on_the_question() -> None:
    assert ThinK(window=16).needs() == Needs(queries=16)
    assert ThinK.query_dependent


def test_a_ratio_that_leaves_no_channel_is_refused() -> None:
    with pytest.raises(PlanError, match=r"think\(ratio=0.95\).*at most 0.9"):
        ThinK(ratio=0.95).columns(64, 10, 10, torch.bfloat16)


@pytest.mark.parametrize("wrong", [{"ratio": -0.1}, {"ratio": 1.5}, {"window": 0}])
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        ThinK(**wrong)  # type: ignore[arg-type]
