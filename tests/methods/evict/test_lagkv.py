"""LagKV keeps the tokens that stand out against those that follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.evict.lagkv import LagKV
from tests.methods.evict.random_layer import best, decide, kept_positions, random_layer
from tests.methods.layer import layer_view


def partition_scores(own: list[Tensor], following: list[Tensor]) -> list[float]:
    """Scores of one partition of one head: keys and values [lag, dim] of it and the next."""
    total = torch.zeros(len(own[0]))
    for x, after in zip(own, following, strict=True):
        low, high = after.min(0).values, after.max(0).values
        deviations = torch.stack([((token - low) / (high - low)).std() for token in x])
        total += torch.softmax(deviations, 0)
    return total.tolist()


def expected_positions(k: Tensor, v: Tensor, sinks: int, lag: int, n: int) -> list[int]:
    """What one head with keys and values [tokens, dim] keeps."""
    kept = list(range(min(sinks, len(k))))
    start = sinks
    while start + 2 * lag <= len(k):
        own = slice(start, start + lag)
        following = slice(start + lag, start + 2 * lag)
        scores = partition_scores([k[own], v[own]], [k[following], v[following]])
        kept += sorted(start + i for i in best(scores, n))
        start += lag
    return kept + list(range(start, len(k)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [40, 41, 47])
@pytest.mark.parametrize("lag", [4, 8])
def test_each_partition_keeps_its_best_by_the_range_of_the_next(
    seed: int, tokens: int, lag: int
) -> None:
    view = random_layer(seed, tokens)
    method = LagKV(sinks=3, lag=lag)
    partitions = (tokens - 3) // lag - 1
    always = tokens - partitions * lag
    budgets = [always + partitions * (lag // 2), always + partitions * 1]
    kept = kept_positions(view, decide(method, view, budgets))
    for head, n in enumerate([lag // 2, 1]):
        assert kept[head] == expected_positions(view.k[head], view.v[head], 3, lag, n)
        assert len(kept[head]) == budgets[head]


def test_a_prompt_never_ends_above_a_budget_that_holds_sinks_and_lag() -> None:
    view = random_layer(3, 47)
    for budget in range(3 + 8 + 4, 48):
        lengths = decide(LagKV(sinks=3, lag=8), view, budget).sum(1)
        assert (lengths <= budget).all()
        assert (lengths > budget - 4).all(), "fewer than one token more per partition"


@pytest.mark.parametrize("chunk", [1, 5, 16, 60])
def test_the_result_does_not_depend_on_chunks(chunk: int) -> None:
    tokens, method = 60, LagKV(sinks=2, lag=8)
    whole = random_layer(4, tokens)
    kept = [torch.empty(0, dtype=torch.int64)] * 2
    for end in range(chunk, tokens + chunk, chunk):
        new = torch.arange(min(end - chunk, tokens), min(end, tokens))
        kept = [torch.cat([old, new]) for old in kept]
        width = max(map(len, kept))
        index = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in kept])
        view = layer_view(
            torch.stack([k[i] for k, i in zip(whole.k, index, strict=True)]),
            torch.stack([v[i] for v, i in zip(whole.v, index, strict=True)]),
            whole.q,
            lengths=[len(row) for row in kept],
            positions=index,
            prompt_tokens=tokens,
        )
        kept = [torch.tensor(row) for row in kept_positions(view, decide(method, view, [35, 26]))]
    assert [row.tolist() for row in kept] == kept_positions(whole, decide(method, whole, [35, 26]))


def test_generated_tokens_are_compressed_like_the_prompts() -> None:
    prompt = decide(LagKV(sinks=2, lag=8), random_layer(5, 42), 30)
    later = random_layer(5, 58, prompt_tokens=42)
    kept = decide(LagKV(sinks=2, lag=8), later, 30)
    assert prompt.sum(1).tolist() == [30, 30]
    assert kept.sum(1).tolist() == [40, 40], "3 of 8 go per partition: of 4 of them, then of 6"
    assert kept_positions(later, kept)[0][-8:] == list(range(50, 58)), "the last one is whole"


@pytest.mark.parametrize("tokens", [1, 10, 40, 300])
def test_a_budget_that_holds_everything_keeps_everything(tokens: int) -> None:
    view = random_layer(6, tokens)
    assert (decide(LagKV(sinks=4, lag=8), view, tokens) == view.cached).all()


def test_sinks_last_partition_and_remainder_stay_whatever_the_budget() -> None:
    view = random_layer(7, 45)
    stay = [*range(3), *range(35, 45)]
    assert kept_positions(view, decide(LagKV(sinks=3, lag=8), view, 1)) == [stay, stay]


def test_a_partition_waits_for_the_whole_of_itself_and_its_successor() -> None:
    view = random_layer(8, 20, dropped=(0, 2))
    full, lacking = list(range(20)), [i for i in range(20) if i not in (9, 13)]
    view.positions = torch.tensor([full, [*lacking, -1, -1]])
    kept = kept_positions(view, decide(LagKV(sinks=0, lag=4), view, 8))
    assert [len(kept[0]), kept[0][-4:]] == [8, [16, 17, 18, 19]]
    assert len(kept[1]) == 18 - 3, "only its first partition is whole and has a whole successor"
    assert set(kept[1]) >= set(lacking[4:])


def test_constant_keys_and_values_give_finite_scores() -> None:
    view = random_layer(9)
    view.k, view.v = torch.ones_like(view.k), torch.ones_like(view.v)
    assert not LagKV(sinks=0, lag=8).scores(view).isnan().any()
    assert kept_positions(view, decide(LagKV(sinks=0, lag=20), view, 22))[0][:2] == [0, 1]


def test_it_acts_in_chunks_and_whenever_a_partition_is_full() -> None:
    assert (LagKV.per_chunk, LagKV(lag=32).interval) == (True, 32)
    assert not LagKV.query_dependent


@pytest.mark.parametrize("wrong", [{"sinks": -1}, {"lag": 0}, {"budget": 144}, {"budget": 1.01}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="must be"):
        LagKV(**wrong)
