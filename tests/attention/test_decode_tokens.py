"""Decode over listed tokens equals attention over those tokens alone, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import decode
from tamis.attention.pattern import TokenList
from tests.attention import naive
from tests.threads import on_threads

Decode = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=naive.BACKENDS, scope="session")
def implementation(request: pytest.FixtureRequest) -> Decode:
    """Paged decode by one backend and instruction set."""
    return naive.implementation("decode", request.param)


def random_tokens(lengths: Sequence[Sequence[int]], share: float) -> TokenList:
    """About a share of each head's tokens; what lies past a head's count is not an index."""
    lists = [[(torch.rand(one) < share).nonzero()[:, 0] for one in row] for row in lengths]
    counts = torch.tensor([[len(one) for one in row] for row in lists], dtype=torch.int32)
    indices = torch.full((*counts.shape, int(counts.max()) + 2), -1, dtype=torch.int32)
    for row, heads in enumerate(lists):
        for head, one in enumerate(heads):
            indices[row, head, : len(one)] = one
    return TokenList(indices, counts)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """What describes one call; `build` makes its tensors."""
    n, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = st.lists(st.integers(0, 300), min_size=kv_heads, max_size=kv_heads)
    k_dim = draw(st.sampled_from([8, 40, 64]))
    return {
        "lengths": draw(st.lists(heads, min_size=n, max_size=n)),
        "share": draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
        "group": draw(st.integers(1, 5)),
        "k_dim": k_dim,
        "v_dim": draw(st.sampled_from([k_dim, 24])),
        "dtype": draw(st.sampled_from(list(naive.TOLERANCE))),
        "page_size": draw(st.sampled_from([1, 16, 64])),
        "gap": draw(st.sampled_from([1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "window": draw(st.none() | st.integers(1, 200)),
        "sinks": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def build(case: dict) -> tuple[torch.Tensor, naive.Cached, dict]:
    """Queries, cached tokens and options of a case."""
    torch.manual_seed(case["seed"])
    names = ("lengths", "page_size", "k_dim", "v_dim", "dtype", "gap")
    cached = naive.cached(**{name: case[name] for name in names})
    n, q_heads = len(case["lengths"]), len(case["lengths"][0]) * case["group"]
    q = torch.randn(n, q_heads, case["k_dim"]).to(case["dtype"])
    next_positions = [max(int(p[-1]) + 1 if len(p) else 0 for p in row) for row in cached.positions]
    options = {
        "scale": case["k_dim"] ** -0.5,
        "positions": torch.tensor(next_positions),
        "window": case["window"],
        "softcap": case["softcap"],
        "sinks": torch.randn(q_heads) if case["sinks"] else None,
        "tokens": random_tokens(case["lengths"], case["share"]),
    }
    return q, cached, options


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_equals_the_definition(implementation: Decode, case: dict) -> None:
    q, cached, options = build(case)
    out, lse = implementation(q, cached.kv, **options)
    want_out, want_lse = naive.decode(q, cached, **options)
    tolerance = naive.TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), want_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def ragged() -> naive.Cached:
    """One long head among short and empty ones."""
    torch.manual_seed(0)
    lengths = [[9001, 5], [0, 700], [64, 513]]
    return naive.cached(lengths, page_size=16, k_dim=64, v_dim=64, dtype=torch.float32)


def test_a_list_of_every_token_changes_nothing(
    implementation: Decode, ragged: naive.Cached
) -> None:
    q = torch.randn(3, 8, 64)
    every = random_tokens(ragged.kv.lengths.tolist(), 1.1)
    listed = implementation(q, ragged.kv, scale=0.3, tokens=every)
    for one, other in zip(listed, implementation(q, ragged.kv, scale=0.3), strict=True):
        assert torch.equal(one, other)


def test_long_lists_among_short_ones(implementation: Decode, ragged: naive.Cached) -> None:
    q = torch.randn(3, 8, 64)
    tokens = random_tokens(ragged.kv.lengths.tolist(), 0.6)
    out, lse = implementation(q, ragged.kv, scale=0.3, tokens=tokens)
    want_out, want_lse = naive.decode(q, ragged, scale=0.3, tokens=tokens)
    torch.testing.assert_close(out.double(), want_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_strided_lists(implementation: Decode, ragged: naive.Cached) -> None:
    q = torch.randn(3, 8, 64)
    tokens = random_tokens(ragged.kv.lengths.tolist(), 0.3)
    want = implementation(q, ragged.kv, scale=0.2, tokens=tokens)
    layers = TokenList(
        torch.stack([tokens.indices] * 2, 1)[:, 1], torch.stack([tokens.counts] * 2, -1)[..., 1]
    )
    columns = TokenList(tokens.indices.transpose(0, 2).contiguous().transpose(0, 2), tokens.counts)
    for strided in (layers, columns):
        out, lse = implementation(q, ragged.kv, scale=0.2, tokens=strided)
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])


@pytest.mark.usefixtures("extension")
def test_native_bits_do_not_depend_on_threads(ragged: naive.Cached) -> None:
    q = torch.randn(3, 8, 64)
    tokens = random_tokens(ragged.kv.lengths.tolist(), 0.5)
    alone, together = on_threads(
        lambda: decode(q, ragged.kv, scale=0.2, tokens=tokens, backend="native"), 1, 3
    )
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("indices", "counts", "message"),
    [
        ([[[0]]], [[1]], r"for \[3, 2\] rows and heads"),
        ([[[0], [0]], [[0], [0]], [[0], [0]]], [[1, 1]] * 3, "of a head with 0 it names 0 to 0"),
        ([[[0], [5]], [[0], [0]], [[0], [0]]], [[1, 1], [0, 1], [1, 1]], "with 5 it names 5 to 5"),
        ([[[-1], [0]], [[0], [0]], [[0], [0]]], [[1, 0], [0, 0], [0, 0]], "names -1 to -1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    ragged: naive.Cached, indices: list, counts: list, message: str
) -> None:
    tokens = TokenList(torch.tensor(indices).int(), torch.tensor(counts).int())
    with pytest.raises(ValueError, match=message):
        decode(torch.zeros(3, 8, 64), ragged.kv, scale=1.0, tokens=tokens)
