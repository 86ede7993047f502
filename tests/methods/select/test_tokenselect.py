"""TokenSelect lets the heads of a layer vote for tokens, and uses a selection again."""

from __future__ import annotations

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.evict.snapkv import SnapKV
from tamis.methods.select.quest import Quest
from tamis.methods.select.tokenselect import TokenSelect
from tests.methods.decode import NaiveDecodeView, decode_view

METHOD = TokenSelect(k=5, n_init=3, n_local=4)


def step(
    seed: int, *, tokens: int = 30, kv_heads: int = 2, group: int = 2, state: dict | None = None
) -> NaiveDecodeView:
    torch.manual_seed(seed)
    q, k = torch.randn(group * kv_heads, 8), torch.randn(kv_heads, tokens, 8)
    return decode_view(q, k, state=state)


def read(method: TokenSelect, view: NaiveDecodeView) -> list[int]:
    """The tokens that are read, the same by all heads."""
    selection = method.select(view)
    assert selection is not None
    assert selection.tokens is not None
    assert len(selection.tokens) == len(view.k)
    assert (selection.tokens == selection.tokens[0]).all()
    return selection.tokens[0].tolist()


def voted(view: NaiveDecodeView, method: TokenSelect) -> list[int]:
    """The tokens of most votes: every query head's softmax over the middle tokens, summed."""
    group = len(view.q) // len(view.k)
    middle = range(method.n_init, view.k.shape[1] - method.n_local)
    votes = dict.fromkeys(middle, 0.0)
    for head, q in enumerate(view.q):
        scores = [float(view.k[head // group, token] @ q) * view.scale for token in middle]
        for token, share in zip(middle, torch.tensor(scores).softmax(0).tolist(), strict=True):
            votes[token] += share
    return sorted(sorted(middle, key=lambda token: -votes[token])[: int(method.k)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 1), (2, 3)])
def test_it_reads_the_voted_the_first_and_the_last(seed: int, kv_heads: int, group: int) -> None:
    view = step(seed, kv_heads=kv_heads, group=group)
    assert read(METHOD, view) == [0, 1, 2, *voted(view, METHOD), 26, 27, 28, 29]


def test_a_like_query_reads_the_same_and_the_new_last_ones() -> None:
    state: dict = {}
    first = step(0, state=state)
    chosen = read(METHOD, first)[3:-4]
    later = step(1, tokens=32, state=state)
    later.q = first.q + 0.1 * later.q
    assert voted(later, METHOD) != chosen, "the keys changed, a new vote would show"
    assert read(METHOD, later) == [0, 1, 2, *chosen, 28, 29, 30, 31]


def test_another_query_votes_anew() -> None:
    state: dict = {}
    read(METHOD, step(0, state=state))
    later = step(1, tokens=32, state=state)
    assert read(METHOD, later)[3:-4] == voted(later, METHOD)


def test_likeness_is_to_the_query_of_the_last_vote() -> None:
    state: dict = {}
    view = step(0, state=state)
    chosen = read(METHOD, view)[3:-4]
    drift = torch.randn_like(view.q)
    drift *= view.q.norm() / drift.norm()
    near, far = view.q + 0.4 * drift, view.q + 0.8 * drift
    for q in (near, far):
        assert torch.cosine_similarity(q.flatten(), view.q.flatten(), dim=0) < 1
    assert torch.cosine_similarity(near.flatten(), far.flatten(), dim=0) > METHOD.threshold
    keys = step(1).k
    assert read(METHOD, decode_view(near, keys, state=state))[3:-4] == chosen
    last = decode_view(far, keys, state=state)
    assert read(METHOD, last)[3:-4] == voted(last, METHOD) != chosen


def test_a_cache_that_became_shorter_votes_anew() -> None:
    state: dict = {}
    view = step(0, tokens=60, state=state)
    read(METHOD, view)
    shorter = decode_view(view.q, view.k[:, :20], state=state)
    assert read(METHOD, shorter)[3:-4] == voted(shorter, METHOD)


@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_few_tokens_are_all_read(tokens: int) -> None:
    assert METHOD.select(step(0, tokens=tokens)) is None
    assert METHOD.select(step(0, tokens=13)) is not None


def test_a_share_of_the_cached_tokens_is_rounded_up() -> None:
    assert len(read(TokenSelect(k=0.25, n_init=0, n_local=1), step(0))) == 8 + 1


def test_heads_that_hold_different_tokens_cannot_vote() -> None:
    assert "snapkv" in (METHOD.conflict(SnapKV()) or "")
    assert METHOD.conflict(Quest()) is None


@pytest.mark.parametrize("wrong", [{"k": 0}, {"n_init": -1}, {"n_local": 0}, {"threshold": 1.1}])
def test_parameters_out_of_range_are_plan_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        TokenSelect(**wrong)
