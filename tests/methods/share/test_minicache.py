"""MiniCache stores one direction and two lengths for pairs of layers that point alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.share.minicache import MiniCache
from tests.methods.codec.pages import assert_declared, bytes_per_token

KV = tuple[Tensor, Tensor]


def layers(
    seed: int, heads: int, tokens: int, dtype: torch.dtype = torch.float32, apart: float = 0.3
) -> tuple[KV, KV]:
    """Keys [heads, tokens, 8] and values [heads, tokens, 6] of two layers, `apart` from another
    by a share that differs from token to token."""
    torch.manual_seed(seed)
    first = [torch.randn(heads, tokens, dim) for dim in (8, 6)]
    second = [
        (x + apart * torch.rand(tokens, 1) * torch.randn_like(x)) * (0.5 + torch.rand(tokens, 1))
        for x in first
    ]
    k, v, k2, v2 = (x.to(dtype) for x in (*first, *second))
    return (k, v), (k2, v2)


def naive_angle(x: list[float], y: list[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return math.acos(max(-1.0, min(1.0, dot / (math.hypot(*x) * math.hypot(*y)))))


def naive_retained(x: Tensor, y: Tensor, gamma: float) -> list[bool]:
    """Which tokens of [heads, tokens, dim] are among the least similar pairs."""
    distances = [
        sum(naive_angle(x[h, t].tolist(), y[h, t].tolist()) / math.pi for h in range(len(x)))
        / len(x)
        for t in range(x.shape[1])
    ]
    low, high = min(distances), max(distances)
    return [d > high - gamma * (high - low) for d in distances]


def naive_slerp(x: list[float], y: list[float], t: float) -> list[float]:
    angle = naive_angle(x, y)
    a = math.sin((1 - t) * angle) / math.sin(angle) / math.hypot(*x)
    b = math.sin(t * angle) / math.sin(angle) / math.hypot(*y)
    return [a * p + b * q for p, q in zip(x, y, strict=True)]


@pytest.mark.parametrize(("seed", "heads", "tokens"), [(0, 1, 12), (1, 3, 20), (2, 4, 7)])
@pytest.mark.parametrize(("t", "gamma"), [(0.6, 0.05), (0.3, 0.5)])
def test_merges_what_the_papers_formulas_give(
    seed: int, heads: int, tokens: int, t: float, gamma: float
) -> None:
    first, second = layers(seed, heads, tokens)
    method = MiniCache(t=t, gamma=gamma)
    merged, fields = method.merge(first, second)
    apart = [naive_retained(x, y, gamma) for x, y in zip(first, second, strict=True)]
    assert merged.tolist() == [not (k or v) for k, v in zip(*apart, strict=True)]
    tokens_merged = merged.nonzero().flatten().tolist()
    read = [method.restore(fields, member) for member in (0, 1)]
    for part in (0, 1):
        for head in range(heads):
            for i, token in enumerate(tokens_merged):
                x, y = (layer[part][head, token].tolist() for layer in (first, second))
                direction = torch.tensor(naive_slerp(x, y, t))
                for member, own in enumerate((x, y)):
                    torch.testing.assert_close(
                        read[member][part][head, i], direction * math.hypot(*own)
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lengths_are_kept_and_fields_are_the_declared_ones(dtype: torch.dtype) -> None:
    first, second = layers(0, 2, 16, dtype)
    method = MiniCache()
    merged, fields = method.merge(first, second)
    assert_declared(fields, method.columns(8, 6, dtype), (2,), int(merged.sum()))
    for member, layer in enumerate((first, second)):
        for got, x in zip(method.restore(fields, member), layer, strict=True):
            assert got.dtype == torch.float32
            lengths = x[:, merged].float().norm(dim=2)
            torch.testing.assert_close(got.norm(dim=2), lengths, rtol=0.01, atol=0)


def test_layers_that_point_alike_merge_whole_and_exactly() -> None:
    (k, v), _ = layers(0, 2, 16)
    method = MiniCache()
    merged, fields = method.merge((k, v), (4 * k, 0.25 * v))
    assert merged.all()
    for member, factors in enumerate(((1, 1), (4, 0.25))):
        k_read, v_read = method.restore(fields, member)
        torch.testing.assert_close(k_read, factors[0] * k)
        torch.testing.assert_close(v_read, factors[1] * v)


@pytest.mark.parametrize(("t", "member"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_the_line_are_the_layers_themselves(t: float, member: int) -> None:
    first, second = layers(3, 2, 9)
    method = MiniCache(t=t)
    merged, fields = method.merge(first, second)
    for got, x in zip(method.restore(fields, member), (first, second)[member], strict=True):
        torch.testing.assert_close(got, x[:, merged])


def test_the_most_unlike_pair_stays_apart_in_keys_or_in_values() -> None:
    first, second = layers(0, 2, 16, apart=0.05)
    second[0][:, 3] *= -1
    second[1][:, 11] *= -1
    merged, _ = MiniCache().merge(first, second)
    assert (~merged).nonzero().flatten().tolist() == [3, 11]


def test_zero_opposite_and_tiny_vectors_stay_finite() -> None:
    first, second = layers(0, 1, 4)
    for part in (0, 1):
        first[part][0, 0] = 0
        second[part][0, 0] = 0
        second[part][0, 1] = -first[part][0, 1]
        first[part][0, 2] = 0
        second[part][0, 3] *= 1e-30
    method = MiniCache(gamma=0.0)
    merged, fields = method.merge(first, second)
    assert merged.all()
    for member, layer in enumerate((first, second)):
        for got, x in zip(method.restore(fields, member), layer, strict=True):
            assert got.isfinite().all()
            assert got[0, 0].abs().max() == 0
            if member == 0:
                assert got[0, 2].abs().max() == 0
            else:
                torch.testing.assert_close(got[0, 2], x[0, 2])


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_merge_too(tokens: int) -> None:
    first, second = layers(0, 2, tokens)
    merged, fields = MiniCache().merge(first, second)
    assert merged.shape == (tokens,)
    assert merged.all()
    assert_declared(fields, MiniCache().columns(8, 6, torch.float32), (2,), tokens)


def test_pages_are_restored_alike_one_by_one_or_together() -> None:
    first, second = layers(0, 2, 16)
    method = MiniCache(gamma=0.0)
    _, fields = method.merge(first, second)
    paged = {name: x.unflatten(1, (4, 4)) for name, x in fields.items()}
    k, v = method.restore(paged, 1)
    whole_k, whole_v = method.restore(fields, 1)
    assert torch.equal(k.flatten(1, 2), whole_k)
    assert torch.equal(v.flatten(1, 2), whole_v)


@pytest.mark.parametrize(
    ("n_layers", "pairs"),
    [(1, []), (2, []), (3, [(1, 2)]), (4, [(2, 3)]), (7, [(3, 4), (5, 6)]), (5, [(2, 3)])],
)
def test_pairs_begin_at_the_middle_layer(n_layers: int, pairs: list[tuple[int, int]]) -> None:
    assert MiniCache().pairs(n_layers) == pairs


def test_nothing_is_shared_from_the_last_layer_on() -> None:
    assert MiniCache(start=1.0).pairs(32) == []
    assert MiniCache(start=0.0).pairs(4) == [(0, 1), (2, 3)]


def test_two_layers_take_one_direction_and_two_lengths() -> None:
    columns = MiniCache().columns(64, 64, torch.bfloat16)
    assert bytes_per_token(columns, 64) == 2 * (64 + 64) + 16


@pytest.mark.parametrize("wrong", [{"t": 1.5}, {"t": -0.1}, {"gamma": 2.0}, {"start": -0.5}])
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        MiniCache(**wrong)
