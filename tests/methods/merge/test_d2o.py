"""D2O: every evicted token is compared with every kept one, one at a time."""

import math

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.base import Evict
from tamis.methods.merge.d2o import D2O
from tests.methods.layer import after_merge, layer_view

HEADS, TOKENS, DIM, V_DIM = 2, 12, 6, 4


def tensors(seed, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    common = 2 * torch.randn(1, 1, DIM, generator=generator)  # so that some keys are alike
    k = torch.randn(HEADS, tokens, DIM, generator=generator) + common
    v = torch.randn(HEADS, tokens, V_DIM, generator=generator)
    sums = torch.rand(HEADS, tokens, generator=generator)
    return k, v, sums


def view_of(k, v, sums, lengths=None, state=None):
    q = torch.zeros(1, 2 * HEADS, DIM)
    return layer_view(k, v, q, lengths=lengths, attention=sums, state=state)


def naive(k, v, kept, evicted, beta, threshold):
    """One head, by the paper's equations: new keys, new values, new threshold."""
    k_new, v_new = k.clone(), v.clone()
    best, nearest = {}, {}
    for i in evicted:
        for j in kept:
            u = float(k[i] @ k[j] / (k[i].norm() * k[j].norm()))
            if i not in best or u > best[i]:
                best[i], nearest[i] = u, j
    mean = sum(best.values()) / len(best)
    threshold = mean if threshold is None else beta * mean + (1 - beta) * threshold
    for j in kept:
        mine = [i for i in evicted if nearest[i] == j and best[i] >= threshold]
        total = math.e + sum(math.exp(best[i]) for i in mine)
        k_new[j] = (math.e * k[j] + sum(math.exp(best[i]) * k[i] for i in mine)) / total
        v_new[j] = (math.e * v[j] + sum(math.exp(best[i]) * v[i] for i in mine)) / total
    return k_new, v_new, threshold


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lengths", [None, [12, 7]])
def test_merging_is_the_papers_formula_step_after_step(seed, lengths):
    method = D2O(budget=4, beta=0.6)
    state, thresholds = {}, [None] * HEADS
    for step in range(3):
        k, v, sums = tensors(10 * seed + step)
        view = view_of(k, v, sums, lengths, state)
        scores = method.eviction().scores(view)
        kept = method.eviction().keep(view, scores, torch.tensor([4, 5]))
        k_new, v_new = after_merge(method, view, scores, kept)
        for head in range(HEADS):
            real = range(int(view.lengths[head]))
            stay = [t for t in real if kept[head, t]]
            go = [t for t in real if not kept[head, t]]
            k_head, v_head, thresholds[head] = naive(
                k[head], v[head], stay, go, method.beta, thresholds[head]
            )
            torch.testing.assert_close(k_new[head, stay], k_head[stay])
            torch.testing.assert_close(v_new[head, stay], v_head[stay])


def test_some_evicted_tokens_merge_and_some_are_dropped():
    k, v, sums = tensors(0)
    view = view_of(k, v, sums)
    method = D2O(budget=4)
    scores = method.eviction().scores(view)
    kept = method.eviction().keep(view, scores, torch.tensor([4, 4]))
    k_new, _ = after_merge(method, view, scores, kept)
    changed = (k_new != k).any(-1) & kept
    assert 0 < int(changed.sum()) < int(kept.sum())


def test_the_threshold_is_remembered_and_the_older_state_left_as_it_was():
    k, v, sums = tensors(1)
    view = view_of(k, v, sums)
    method = D2O(budget=4)
    kept = method.eviction().keep(view, sums, torch.tensor([4, 4]))
    after_merge(method, view, sums, kept)
    (first,) = view.state.values()
    before = first.clone()
    k2, v2, _ = tensors(2)
    after_merge(method, view_of(k2, v2, sums, state=view.state), sums, kept)
    assert torch.equal(first, before)
    assert not torch.equal(next(iter(view.state.values())), before)


def test_nothing_changes_where_nothing_is_evicted():
    k, v, sums = tensors(3)
    view = view_of(k, v, sums, [12, 5])
    method = D2O(budget=12)
    scores = method.eviction().scores(view)
    kept = method.eviction().keep(view, scores, torch.tensor([12, 12]))
    assert torch.equal(kept, view.cached)
    k_new, v_new = after_merge(method, view, scores, kept)
    assert torch.equal(k_new[kept], k[kept])
    assert torch.equal(v_new[kept], v[kept])


def test_the_newest_quarter_of_the_budget_stays_and_beyond_it_what_was_attended_most():
    k, v, sums = tensors(4)
    sums[:, -2:] = 0  # would go if recent tokens were not kept
    eviction = D2O(budget=8).eviction()
    assert isinstance(eviction, Evict)
    assert eviction.interval == 1
    assert eviction.needs().attention
    kept = eviction.keep(view := view_of(k, v, sums), eviction.scores(view), torch.tensor([8, 8]))
    for head in range(HEADS):
        heavy = sums[head, :-2].topk(6).indices.tolist()
        assert set(kept[head].nonzero()[:, 0].tolist()) == {10, 11, *heavy}


def test_one_token_is_kept():
    k, v, sums = tensors(5, tokens=1)
    view = view_of(k, v, sums)
    eviction = D2O().eviction()
    assert eviction.keep(view, eviction.scores(view), torch.tensor([1, 1])).all()


def test_equal_keys_all_merge_into_one_token_with_the_mean_value():
    k = torch.ones(1, 4, DIM)
    v = torch.arange(4.0).view(1, 4, 1)
    view = layer_view(k, v, torch.zeros(1, 1, DIM), attention=torch.tensor([[4.0, 3, 2, 1]]))
    kept = torch.tensor([[True, False, False, False]])
    k_new, v_new = after_merge(D2O(), view, view.attention(), kept)
    torch.testing.assert_close(k_new[0, 0], k[0, 0])
    torch.testing.assert_close(v_new[0, 0], torch.tensor([1.5]))


def test_values_keep_their_dtype():
    k, v, sums = tensors(6)
    view = view_of(k.bfloat16(), v.bfloat16(), sums)
    k_new, v_new = after_merge(D2O(), view, sums, view.cached & (sums > 0.5))
    assert k_new.dtype == v_new.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": 1.5}, {"heavy": -0.1}, {"budget": 0}])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(PlanError, match=next(iter(wrong))):
        D2O(**wrong)
