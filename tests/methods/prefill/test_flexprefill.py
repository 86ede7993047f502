"""FlexPrefill computes as much of a head as its own attention asks for."""

from __future__ import annotations

import math

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.prefill.flexprefill import FlexPrefill, cover, distance
from tamis.methods.views import LayerShape, ModelShape
from tests.methods.chunk import NaiveChunkView, chunk_view, visible_pairs
from tests.methods.prefill.random_chunk import largest, lines, past_of, random_chunk

BLOCK = 4


def mean_keys(view: NaiveChunkView, head: int) -> list[torch.Tensor]:
    """Mean keys of the blocks of a query head."""
    keys = past_of(view, head) + len(view.q)
    k = view.k[head // (view.q.shape[1] // len(view.k)), :keys]
    return [part.mean(0) for part in k.split(BLOCK)]


def jensen_shannon(p: list[float], q: list[float]) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        total += sum(x * math.log(x / ((a + b) / 2)) for x in (a, b) if x > 0)
    return math.sqrt(total / 2)


def query_aware(view: NaiveChunkView, head: int, tau: float) -> bool:
    """Algorithm 2: whether mean keys tell how the last queries' attention is spread over blocks."""
    mean_q = view.q[-BLOCK:, head].mean(0)
    scores = [float(mean_q @ key) * view.scale for key in mean_keys(view, head)]
    estimate = torch.tensor(scores).softmax(0).tolist()
    columns, _ = lines(view, head, BLOCK)
    queries = min(BLOCK, len(view.q))
    true = [sum(columns[i : i + BLOCK]) / queries for i in range(0, len(columns), BLOCK)]
    return jensen_shannon(estimate, true) < tau


def fewest(weights: list[float], share: float) -> int:
    """How many of the largest weights make up a share of 1."""
    total, count = 0.0, 0
    for weight in sorted(weights, reverse=True):
        if total >= share:
            break
        total, count = total + weight, count + 1
    return count


def expected_pairs(view: NaiveChunkView, head: int, method: FlexPrefill) -> torch.Tensor:
    """The pairs of one head by algorithms 3 and 4, bool [tokens, keys]."""
    past, tokens = past_of(view, head), len(view.q)
    own = [past + query for query in range(tokens)]
    blocks = [own[start : start + BLOCK] for start in range(0, tokens, BLOCK)]
    aware = query_aware(view, head, method.tau)
    least = max(1, math.ceil(method.min_budget / BLOCK))
    chosen: list[list[int]] = []
    for sums in lines(view, head, BLOCK):
        shares = [value / min(BLOCK, tokens) for value in sums]
        needed = 0 if aware else math.ceil(fewest(shares, method.gamma) / BLOCK)
        by_block = [sum(shares[i : i + BLOCK]) for i in range(0, len(shares), BLOCK)]
        chosen.append(sorted(largest(by_block, max(least, needed)) | {0}))

    taken = [{p // BLOCK for p in block} | set(chosen[0]) for block in blocks]
    for block, indices in zip(blocks, taken, strict=True):
        indices |= {(p - o * BLOCK) // BLOCK for p in block for o in chosen[1] if o * BLOCK <= p}
    if aware:
        keys = mean_keys(view, head)
        weights = {}
        for row, block in enumerate(blocks):
            mean_q = view.q[row * BLOCK : (row + 1) * BLOCK, head].mean(0)
            seen = range(block[-1] // BLOCK + 1)
            scores = [float(mean_q @ keys[index]) * view.scale for index in seen]
            for index, weight in enumerate(torch.tensor(scores).softmax(0).tolist()):
                weights[row, index] = weight / len(blocks)
        order = sorted(weights, key=lambda pair: -weights[pair])
        for row, index in order[: fewest(list(weights.values()), method.gamma)]:
            taken[row].add(index)

    pairs = torch.zeros(tokens, view.k.shape[1], dtype=torch.bool)
    for query, p in enumerate(own):
        for index in taken[query // BLOCK]:
            pairs[query, index * BLOCK : (index + 1) * BLOCK] = True
        pairs[query, p + 1 :] = False
    return pairs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0.0, 0.2, 2.0])
@pytest.mark.parametrize(
    ("tokens", "past"), [(24, (0, 0)), (22, (18, 18)), (17, (2, 21)), (2, (11, 30))]
)
@pytest.mark.parametrize("gamma", [0.3, 0.8])
def test_the_pairs_are_those_of_the_algorithms(
    seed: int, tau: float, tokens: int, past: tuple[int, ...], gamma: float
) -> None:
    view = random_chunk(seed, tokens, past)
    method = FlexPrefill(gamma=gamma, tau=tau, min_budget=5, block=BLOCK)
    pattern = method.pattern(view)
    assert pattern is not None
    pairs = visible_pairs(pattern, view)
    for head in range(view.q.shape[1]):
        assert torch.equal(pairs[head], expected_pairs(view, head, method)), f"head {head}"


def test_heads_of_both_kinds_occur_in_these_tests() -> None:
    kinds = [
        query_aware(random_chunk(seed, 24, (0, 0)), head, 0.2)
        for seed in range(3)
        for head in range(4)
    ]
    assert {True, False} == set(kinds)


def test_flat_attention_is_estimated_by_blocks_and_a_needle_is_not() -> None:
    view = random_chunk(0, 32, (0,), group=1, spread=0.0)
    assert query_aware(view, 0, 0.1)
    view.q[:] = view.k[0, 5] * 30  # one key of its block
    assert not query_aware(view, 0, 0.1)
    pattern = FlexPrefill(gamma=0.9, min_budget=0, block=BLOCK).pattern(view)
    assert pattern is not None
    assert visible_pairs(pattern, view)[0, 6:, 5].all()


def test_more_attention_takes_more_pairs() -> None:
    view = random_chunk(0, 64, (0, 0))
    densities = []
    for gamma in (0.2, 0.5, 0.9, 1.0):
        pattern = FlexPrefill(gamma=gamma, min_budget=0, block=BLOCK).pattern(view)
        assert pattern is not None
        densities.append(pattern.density(view.lengths, 64))
    assert densities == sorted(densities)
    assert densities[0] < 0.6
    assert densities[-1] == 1.0


@pytest.mark.parametrize(("tokens", "past"), [(1, (0, 0)), (20, (0, 0)), (4, (60, 50))])
def test_chunks_within_the_minimum_are_computed_whole(tokens: int, past: tuple[int, ...]) -> None:
    view = random_chunk(0, tokens, past)
    assert FlexPrefill(min_budget=64, block=BLOCK).pattern(view) is None
    assert FlexPrefill().pattern(view) is None


def test_sliding_window_layers_are_left_alone() -> None:
    view = random_chunk(0, 24, (0, 0))
    shape = ModelShape((LayerShape(4, 2, 8, 8, window=8),), 16, torch.float32)
    method = FlexPrefill(min_budget=0, block=BLOCK)
    assert method.pattern(chunk_view(view.q, view.k, shape=shape)) is None


def test_equal_distributions_have_distance_0_and_disjoint_ones_the_largest() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.2, 0.3, 0.5, 0.0]])
    assert distance(p, p).tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
    assert float(distance(p[:1], p[:1].flip(1))) == pytest.approx(math.sqrt(math.log(2)))


def test_of_equal_weights_the_earlier_cover() -> None:
    weights = torch.full((1, 8), 0.125)
    assert cover(weights, 0.5)[0].tolist() == [True] * 4 + [False] * 4
    assert cover(weights, 0.51).sum() == 5
    assert cover(weights, 1.0).all()


@pytest.mark.parametrize(
    "wrong", [{"gamma": 0.0}, {"gamma": 1.1}, {"tau": -0.1}, {"min_budget": -1}, {"block": 0}]
)
def test_parameters_out_of_range_are_plan_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        FlexPrefill(**wrong)
