"""Paged decode equals attention by its definition, on every backend and instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import decode
from tamis.cache.format import PagedKV
from tamis.errors import ConfigError
from tests.attention import naive
from tests.threads import on_threads

Decode = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=naive.BACKENDS, scope="session")
def implementation(request: pytest.FixtureRequest) -> Decode:
    """Paged decode by one backend and instruction set."""
    return naive.implementation("decode", request.param)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """What describes one decode call; `build` makes its tensors."""
    n, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = st.lists(st.integers(0, 140), min_size=kv_heads, max_size=kv_heads)
    k_dim = draw(st.sampled_from([8, 32, 40, 64, 80, 128]))
    return {
        "lengths": draw(st.lists(heads, min_size=n, max_size=n)),
        "group": draw(st.integers(1, 9)),
        "k_dim": k_dim,
        "v_dim": draw(st.sampled_from([k_dim, 8, 24, 64, 96])),
        "dtype": draw(st.sampled_from(list(naive.TOLERANCE))),
        "page_size": draw(st.sampled_from([1, 4, 16, 64])),
        "gap": draw(st.sampled_from([1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "window": draw(st.none() | st.integers(1, 200)),
        "sinks": draw(st.booleans()),
        "positions_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
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
        "positions": torch.tensor(next_positions, dtype=case["positions_dtype"]),
        "window": case["window"],
        "softcap": case["softcap"],
        "sinks": torch.randn(q_heads) if case["sinks"] else None,
    }
    return q, cached, options


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_equals_the_definition(implementation: Decode, case: dict) -> None:
    q, cached, options = build(case)
    out, lse = implementation(q, cached.kv, **options)
    want_out, want_lse = naive.decode(q, cached, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    tolerance = naive.TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), want_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def ragged() -> naive.Cached:
    """One long head, many chunks of work, among short and empty ones."""
    torch.manual_seed(0)
    lengths = [[3001, 5], [0, 700], [64, 513]]
    return naive.cached(lengths, page_size=16, k_dim=64, v_dim=64, dtype=torch.float32)


def test_long_heads_among_short_ones(implementation: Decode, ragged: naive.Cached) -> None:
    q = torch.randn(3, 8, 64)
    out, lse = implementation(q, ragged.kv, scale=0.3)
    want_out, want_lse = naive.decode(q, ragged, scale=0.3)
    torch.testing.assert_close(out.double(), want_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_large_scores_neither_overflow_nor_lose_the_maximum(
    implementation: Decode, ragged: naive.Cached
) -> None:
    q = torch.randn(3, 8, 64) * 1e3
    out, lse = implementation(q, ragged.kv, scale=1.0)
    want_out, want_lse = naive.decode(q, ragged, scale=1.0)
    torch.testing.assert_close(out.double(), want_out, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_nan_is_not_hidden(implementation: Decode, ragged: naive.Cached) -> None:
    q = torch.randn(3, 8, 64)
    q[0, 0] = torch.nan
    out, lse = implementation(q, ragged.kv, scale=1.0)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan()
    assert not out[0, 1:].isnan().any()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_native_bits_depend_on_neither_threads_nor_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    cached = naive.cached([[2500, 5], [600, 90]], page_size=16, k_dim=64, v_dim=64, dtype=dtype)
    q = torch.randn(2, 12, 64).to(dtype)
    alone, together = on_threads(lambda: decode(q, cached.kv, scale=0.2, backend="native"), 1, 2)
    kv = cached.kv
    second = PagedKV(kv.data, kv.format, kv.tables[1:], kv.lengths[1:])
    row = decode(q[1:], second, scale=0.2, backend="native")
    for one, two, apart in zip(alone, together, row, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[1:], apart)


def test_strided_arguments(implementation: Decode, ragged: naive.Cached) -> None:
    kv = ragged.kv
    wide = torch.stack([kv.tables, kv.tables], 1)  # as of two layers
    lengths = torch.stack([kv.lengths, kv.lengths], 1)
    strided = PagedKV(kv.data, kv.format, wide[:, 1], lengths[:, 1])
    q = torch.randn(8, 3, 64).transpose(0, 1)
    dims_first = torch.randn(64, 3, 8).permute(1, 2, 0)
    for query in (q, dims_first):
        out, lse = implementation(query, strided, scale=0.2)
        want = implementation(query.contiguous(), kv, scale=0.2)
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])


def test_an_empty_batch(implementation: Decode, ragged: naive.Cached) -> None:
    kv = ragged.kv
    none = PagedKV(kv.data, kv.format, kv.tables[:0], kv.lengths[:0])
    out, lse = implementation(torch.zeros(0, 8, 64), none, scale=1.0)
    assert out.shape == (0, 8, 64)
    assert lse.shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 8, 32)}, r"q must be \[tokens, q_heads, 64\]"),
        ({"q": torch.zeros(3, 8, 64).bfloat16()}, "share one dtype"),
        ({"q": torch.zeros(3, 7, 64)}, "7 query heads cannot be shared by 2 KV heads"),
        ({"q": torch.zeros(2, 8, 64)}, "2 queries .* 3 rows"),
        ({"window": 5}, "window needs positions"),
        ({"window": 0, "positions": torch.arange(3)}, "at least 1, got 0"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions must be int32 or int64 \[3"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[8\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    ragged: naive.Cached, changes: dict, message: str
) -> None:
    arguments = {"q": torch.zeros(3, 8, 64), "kv": ragged.kv, "scale": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        decode(**arguments)


def test_tables_of_another_dtype_are_refused(ragged: naive.Cached) -> None:
    kv = ragged.kv
    wrong = PagedKV(kv.data, kv.format, kv.tables.long(), kv.lengths)
    with pytest.raises(ValueError, match=r"must be torch\.int32"):
        decode(torch.zeros(3, 8, 64), wrong, scale=1.0)


def test_an_unknown_backend_is_refused(
    ragged: naive.Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'cuda'"):
        decode(torch.zeros(3, 8, 64), ragged.kv, scale=1.0, backend="cuda")
    monkeypatch.setenv("TAMIS_BACKEND", "fast")
    with pytest.raises(ConfigError, match="unknown backend 'fast'"):
        decode(torch.zeros(3, 8, 64), ragged.kv, scale=1.0)
