"""KVMerger: sets and weights, found token by token."""

import math

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.merge.kvmerger import KVMerger
from tests.methods.layer import after_merge, layer_view

HEADS, TOKENS, DIM, V_DIM = 2, 40, 6, 3


def tensors(seed):
    """Keys that drift slowly and now and then jump, so that there are sets of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(HEADS, TOKENS, DIM, generator=generator)
    jump = torch.rand(HEADS, TOKENS, 1, generator=generator) < 0.3
    k = torch.where(jump, 4 * steps, 0.5 * steps).cumsum(1)
    v = torch.randn(HEADS, TOKENS, V_DIM, generator=generator)
    return k, v, torch.rand(HEADS, TOKENS, generator=generator)


def view_of(k, v, sums, lengths=None):
    return layer_view(k, v, torch.zeros(1, 2 * HEADS, DIM), lengths=lengths, attention=sums)


def naive_sets(k, sums, length, method, budget):
    """One head: its protected tokens, and the sets of the others, in order."""
    recent = [t for t in range(length) if t >= length - round(method.recent * budget)]
    others = [t for t in range(length) if t not in recent]
    heavy = sorted(others, key=lambda t: -sums[t])[: round(method.heavy * budget)]
    protected, sets = set(recent) | set(heavy), []
    for t in range(length):
        if t in protected:
            continue
        joins = bool(sets) and sets[-1][-1] == t - 1
        if joins:
            cosine = float(k[t] @ k[t - 1] / (k[t].norm() * k[t - 1].norm()))
            joins = cosine > method.threshold
        if joins:
            sets[-1].append(t)
        else:
            sets.append([t])
    return protected, sets


def naive_merge(x, k, pivot, others):
    distances = [float((k[pivot] - k[i]).norm()) for i in others]
    sigma = sum(distances) / len(distances) / math.sqrt(2)
    kernel = [math.exp(-(d**2) / (2 * sigma**2)) for d in distances]
    total = x[pivot] + sum(g * x[i] for g, i in zip(kernel, others, strict=True))
    return total / (1 + sum(kernel))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lengths", [None, [40, 33]])
def test_sets_pivots_and_weights_are_the_papers(seed, lengths):
    k, v, sums = tensors(seed)
    view = view_of(k, v, sums, lengths)
    method = KVMerger(budget=30, recent=0.2, heavy=0.1)
    eviction = method.eviction()
    scores = eviction.scores(view)
    kept = eviction.keep(view, scores, torch.tensor([30, 30]))
    k_new, v_new = after_merge(method, view, scores, kept)
    merged = 0
    for head in range(HEADS):
        length = int(view.lengths[head])
        protected, sets = naive_sets(k[head], sums[head], length, method, 30)
        pivots = {max(one, key=lambda t: sums[head, t]): one for one in sets}
        assert set(kept[head].nonzero()[:, 0].tolist()) == protected | set(pivots)
        for pivot, one in pivots.items():
            others = [t for t in one if t != pivot]
            for x, new in ((k, k_new), (v, v_new)):
                expected = (
                    naive_merge(x[head], k[head], pivot, others) if others else x[head, pivot]
                )
                torch.testing.assert_close(new[head, pivot], expected)
            merged += len(others)
        untouched = sorted(protected)
        assert torch.equal(k_new[head, untouched], k[head, untouched])
    assert merged > 5


def test_a_head_within_its_budget_keeps_everything_as_it_is():
    k, v, sums = tensors(0)
    view = view_of(k, v, sums, [40, 30])
    method = KVMerger(budget=40)
    eviction = method.eviction()
    scores = eviction.scores(view)
    kept = eviction.keep(view, scores, torch.tensor([40, 40]))
    assert torch.equal(kept, view.cached)
    k_new, v_new = after_merge(method, view, scores, kept)
    assert torch.equal(k_new[kept], k[kept])
    assert torch.equal(v_new[kept], v[kept])


def test_a_head_that_cannot_merge_enough_drops_the_least_attended_pivots():
    k, v, sums = tensors(1)
    view = view_of(k, v, sums)
    eviction = KVMerger(budget=8, threshold=1.0, recent=0.0, heavy=0.0).eviction()
    kept = eviction.keep(view, eviction.scores(view), torch.tensor([8, 8]))
    for head in range(HEADS):
        assert set(kept[head].nonzero()[:, 0].tolist()) == set(sums[head].topk(8).indices.tolist())


def test_with_another_eviction_tokens_join_the_best_kept_token_of_their_set_or_are_dropped():
    k = torch.tensor([[[1.0, 0], [1, 0.1], [1, 0.2], [-1, 0], [-1, 0.1]]])
    v = torch.arange(5.0).view(1, 5, 1)
    view = layer_view(k, v, torch.zeros(1, 1, 2))
    scores = torch.tensor([[1.0, 5.0, 3.0, 2.0, 2.0]])
    kept = torch.tensor([[True, False, True, False, False]])
    k_new, v_new = after_merge(KVMerger(), view, scores, kept)
    expected = naive_merge(v[0], k[0], 2, [1])
    torch.testing.assert_close(v_new[0, 2], expected)
    assert torch.equal(v_new[0, 0], v[0, 0])
    assert torch.equal(k_new[0, 0], k[0, 0])


def test_equal_keys_become_their_mean():
    v = torch.arange(4.0).view(1, 4, 1)
    sums = torch.ones(1, 4)
    view = layer_view(torch.ones(1, 4, 2), v, torch.zeros(1, 1, 2), attention=sums)
    method = KVMerger(budget=2, recent=0.0, heavy=0.0)
    scores = method.eviction().scores(view)
    kept = method.eviction().keep(view, scores, torch.tensor([2]))
    assert kept.tolist() == [[True, False, False, False]]  # of equal ones the earliest
    _, v_new = after_merge(method, view, scores, kept)
    torch.testing.assert_close(v_new[0, 0], torch.tensor([1.5]))


def test_one_token_is_kept():
    view = layer_view(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
    method = KVMerger(budget=1)
    view.given_attention = torch.ones(1, 1)
    scores = method.eviction().scores(view)
    assert method.eviction().keep(view, scores, torch.tensor([1])).all()


def test_it_asks_for_attention_sums_and_keeps_dtypes():
    k, v, sums = tensors(2)
    view = view_of(k.bfloat16(), v.bfloat16(), sums)
    method = KVMerger(budget=20)
    assert method.eviction().needs().attention
    scores = method.eviction().scores(view)
    kept = method.eviction().keep(view, scores, torch.tensor([20, 20]))
    k_new, v_new = after_merge(method, view, scores, kept)
    assert k_new.dtype == v_new.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"threshold": 1.5}, {"recent": 2.0}, {"budget": 1.5}])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(PlanError, match=next(iter(wrong))):
        KVMerger(**wrong)
