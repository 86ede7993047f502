"""Softmax over cached tokens and the tokens it weighs most, by every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import observe, observe_native, observe_reference
from tamis.platform import native_module
from tests.attention import naive

PUBLIC = ["reference", *(["native"] if native_module(warn=False) else [])]


def heads(most: int) -> st.SearchStrategy[list[list[int]]]:
    """Lengths of up to three heads in two rows."""
    row = st.integers(1, 3)
    return row.flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, most), min_size=n, max_size=n), min_size=2, max_size=2
        )
    )


@pytest.mark.parametrize("backend", PUBLIC)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=heads(150),
    group=st.integers(1, 4),
    k_dim=st.sampled_from([8, 33, 64]),
    dtype=st.sampled_from(list(naive.TOLERANCE)),
    softcap=st.sampled_from([None, 2.0]),
    r=st.none() | st.integers(0, 8),
    divided=st.booleans(),
    ends=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    seed=st.integers(0, 1000),
)
def test_weights_are_the_softmax_of_the_tokens_between(
    backend: str,
    lengths: list[list[int]],
    group: int,
    k_dim: int,
    dtype: torch.dtype,
    softcap: float | None,
    r: int | None,
    divided: bool,
    ends: tuple[int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    cached = naive.cached(lengths, page_size=16, k_dim=k_dim, v_dim=8, dtype=dtype)
    kv_heads, scale = len(lengths[0]), k_dim**-0.5
    q = torch.randn(2, kv_heads * group, k_dim).to(dtype)
    channels = None if r is None else torch.rand(2, kv_heads, k_dim).argsort(-1)[..., :r]
    divisors = torch.rand(2, kv_heads * group) + 0.3 if divided else None
    found = observe.token_weights(
        q,
        cached.kv,
        scale=scale,
        softcap=softcap,
        channels=channels,
        divisors=divisors,
        first=ends[0],
        last=ends[1],
        backend=backend,
    )
    want = torch.zeros_like(found, dtype=torch.float64)
    for row in range(2):
        for head in range(q.shape[1]):
            k = cached.k[row][head // group].double()
            named = slice(None) if channels is None else channels[row, head // group]
            scores = k[:, named] @ q[row, head, named].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if divisors is not None:
                scores = scores / divisors[row, head].double()
            between = slice(ends[0], max(ends[0], len(k) - ends[1]))
            want[row, head, : len(k)][between] = scores[between].softmax(0)
    torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("isa", [name for name in naive.BACKENDS if name != "reference"])
@pytest.mark.parametrize("width", [1, 15, 16, 100])
def test_every_instruction_set_softens_alike(isa: str, width: int) -> None:
    torch.manual_seed(0)
    scores = 10 * torch.randn(1, 6, width)
    lengths = torch.tensor([[width, max(0, width - 5)]], dtype=torch.int32)
    how = {"divisors": torch.rand(1, 6) + 0.5, "first": 2, "last": 1}
    want = observe_reference.softmax_tokens(scores, lengths, **how)
    found = observe_native.softmax_tokens(native_module(), scores.clone(), lengths, **how, isa=isa)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", PUBLIC)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 300) | st.integers(1000, 5000), min_size=1, max_size=3),
    count=st.integers(1, 320),
    ends=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    kind=st.sampled_from(["spread", "equal", "close", "falling"]),
    seed=st.integers(0, 1000),
)
def test_top_tokens_are_those_of_largest_value_and_the_ends(
    backend: str,
    lengths: list[int],
    count: int,
    ends: tuple[int, int],
    kind: str,
    seed: int,
) -> None:
    """Values that differ, that are often equal, that differ in their last bits only, and of which
    every 16th, as the kernel samples, is no measure of the others."""
    torch.manual_seed(seed)
    values = torch.randn(len(lengths), max(lengths) + 3)
    if kind == "equal":
        values = values.round()
    elif kind == "close":
        values = 1 + values * 1e-6
    elif kind == "falling":
        values[:, ends[0] % values.shape[1] :: 16] = 9.0
    found = observe.top_tokens(
        values, torch.tensor(lengths), count, first=ends[0], last=ends[1], backend=backend
    )
    for row, length in enumerate(lengths):
        there = min(count, length)
        first = list(range(length))[: min(ends[0], there)]
        left = list(range(len(first), length))
        last = left[len(left) - min(ends[1], there - len(first)) :]
        between = left[: len(left) - len(last)]
        best = sorted(between, key=lambda token: (-values[row, token].item(), token))
        chosen = sorted([*first, *best[: there - len(first) - len(last)], *last])
        assert found[row].tolist() == chosen + list(range(length, length + count - there))


@pytest.mark.usefixtures("extension")
def test_native_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    cached = naive.cached([[9000, 600]], page_size=16, k_dim=40, v_dim=8, dtype=torch.bfloat16)
    q = torch.randn(1, 6, 40).to(torch.bfloat16)
    before = torch.get_num_threads()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        weights = observe.token_weights(q, cached.kv, scale=0.3, backend="native")[0]
        lengths = torch.full((6,), 9000)
        return weights, observe.top_tokens(weights, lengths, 700, last=9, backend="native")

    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(4)
        together = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", PUBLIC)
def test_scores_of_any_size_stay_finite(backend: str) -> None:
    cached = naive.cached([[70]], page_size=16, k_dim=8, v_dim=8, dtype=torch.float32)
    q = torch.full((1, 2, 8), 1e18)
    weights = observe.token_weights(q, cached.kv, scale=1.0, backend=backend)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": -1}, "first and last must be at least 0, got -1 and 0"),
        ({"divisors": torch.ones(1, 3)}, r"divisors must be \[1, 4\]"),
        ({"channels": torch.full((1, 2, 1), 8)}, "channels must be 0..7"),
        ({"q": torch.zeros(2, 4, 8)}, "2 queries cannot read 1 rows"),
    ],
)
def test_arguments_of_weights_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    kv = naive.cached([[5, 3]], page_size=4, k_dim=8, v_dim=8, dtype=torch.float32).kv
    with pytest.raises(ValueError, match=message):
        observe.token_weights(**({"q": torch.zeros(1, 4, 8), "kv": kv, "scale": 1.0} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(2, 9).double()}, "needs float32 values"),
        ({"lengths": torch.tensor([9])}, "needs float32 values"),
        ({"lengths": torch.tensor([9, 10])}, "at most 9"),
        ({"count": 0}, "count must be at least 1"),
        ({"last": -2}, "got 3, 0, -2"),
    ],
)
def test_arguments_of_top_tokens_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    arguments = {"values": torch.zeros(2, 9), "lengths": torch.tensor([9, 9]), "count": 3}
    with pytest.raises(ValueError, match=message):
        observe.top_tokens(**(arguments | changes))


def test_no_tokens_weigh_nothing() -> None:
    kv = naive.cached([[0, 0]], page_size=4, k_dim=8, v_dim=8, dtype=torch.float32).kv
    assert observe.token_weights(torch.zeros(1, 4, 8), kv, scale=math.pi).shape == (1, 4, 0)
