"""SparQ finds its tokens with a few channels, and the mean value stands for the others."""

from __future__ import annotations

import math

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.select.sparq import SparQ
from tests.methods.decode import NaiveDecodeView, decode_view


def step(
    seed: int, method: SparQ, *, lengths: tuple[int, ...] = (30, 30), group: int = 2
) -> NaiveDecodeView:
    torch.manual_seed(seed)
    q = torch.randn(group * len(lengths), 8)
    k = torch.randn(len(lengths), max(lengths), 8)
    return decode_view(q, k, torch.randn(*k.shape[:2], 5), lengths=list(lengths), method=method)


def approximate(view: NaiveDecodeView, head: int, r: int) -> list[torch.Tensor]:
    """Step 1 of the paper's algorithm: s_hat of each query head that shares this KV head."""
    group = len(view.q) // len(view.k)
    queries = view.q[head * group : (head + 1) * group]
    size = [sum(abs(float(q[i])) for q in queries) for i in range(view.q.shape[1])]
    channels = sorted(range(len(size)), key=lambda i: -size[i])[:r]
    keys = view.k[head, : int(view.lengths[head])]
    result = []
    for q in queries:
        share = sum(abs(float(q[i])) for i in channels) / float(q.abs().sum())
        tau = math.sqrt(len(q) * share)
        scores = [sum(float(q[i] * key[i]) for i in channels) / tau for key in keys]
        result.append(torch.tensor(scores).softmax(0))
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("lengths", [(30, 30), (29, 4, 33)])
def test_tokens_and_weights_are_those_of_the_algorithm(
    seed: int, group: int, lengths: tuple[int, ...]
) -> None:
    method = SparQ(r=3, k=10, local=0.25)
    view = step(seed, method, lengths=lengths, group=group)
    selection = method.select(view)
    assert selection is not None
    assert selection.tokens is not None
    assert selection.rest is not None
    assert selection.rest_weight is not None
    for head, length in enumerate(lengths):
        s_hat = approximate(view, head, 3)
        votes = sum(s_hat)
        votes[-2:] = math.inf  # a quarter of 10 are local
        expected = sorted(sorted(range(length), key=lambda i: -float(votes[i]))[:10])
        chosen = selection.tokens[head].tolist()
        assert chosen[: len(expected)] == expected
        assert all(token >= length for token in chosen[len(expected) :])
        for i, weights in enumerate(s_hat):
            rest = 1 - sum(float(weights[token]) for token in expected)
            assert float(selection.rest_weight[head * group + i]) == pytest.approx(rest, abs=1e-5)
        torch.testing.assert_close(selection.rest[head], view.v[head, :length].mean(0))


@pytest.mark.parametrize("seed", range(3))
def test_with_all_channels_the_rest_weighs_what_is_not_read(seed: int) -> None:
    method = SparQ(r=1.0, k=12)
    view = step(seed, method)
    selection = method.select(view)
    assert selection is not None
    assert selection.tokens is not None
    read = view.weights().gather(1, selection.tokens.repeat_interleave(2, 0)).sum(1)
    torch.testing.assert_close(selection.rest_weight, 1 - read)


@pytest.mark.parametrize("k", [30, 1000, 1.0])
def test_enough_tokens_are_all_tokens(k: int | float) -> None:
    method = SparQ(k=k)
    assert method.select(step(0, method)) is None
    assert method.select(step(0, method, lengths=(1, 1))) is None


def test_shares_are_rounded_up_and_no_more_than_there_is() -> None:
    for method in (SparQ(k=0.25), SparQ(k=8, r=100)):
        selection = method.select(step(0, method))
        assert selection is not None
        assert selection.tokens is not None
        assert selection.tokens.shape == (2, 8)


def test_a_query_of_zeros_reads_the_newest_token() -> None:
    method = SparQ(k=4)
    view = step(0, method)
    view.q.zero_()
    selection = method.select(view)
    assert selection is not None
    assert selection.tokens is not None
    assert selection.tokens[:, -1].tolist() == [29, 29]
    torch.testing.assert_close(selection.rest_weight, torch.full((4,), 26 / 30))


@pytest.mark.parametrize("wrong", [{"r": 0}, {"k": 0}, {"local": 1.5}, {"local": -0.1}])
def test_parameters_out_of_range_are_plan_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        SparQ(**wrong)
