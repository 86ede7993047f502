"""Prefill equals causal attention by its definition, however the sequence is cut into chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import prefill
from tamis.cache.format import PagedKV
from tests.attention import naive
from tests.threads import on_threads

Prefill = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=naive.BACKENDS, scope="session")
def implementation(request: pytest.FixtureRequest) -> Prefill:
    """Prefill by one backend and instruction set."""
    return naive.implementation("prefill", request.param)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """What describes one prefill call; `naive.prefill_call` makes its tensors."""
    kv_heads = draw(st.integers(1, 3))
    heads = st.lists(st.integers(0, 90), min_size=kv_heads, max_size=kv_heads)
    k_dim = draw(st.sampled_from([8, 32, 40, 64, 128]))
    return {
        "tokens": draw(st.integers(1, 70)),
        "past": draw(st.none() | heads),
        "kv_heads": kv_heads,
        "group": draw(st.integers(1, 5)),
        "k_dim": k_dim,
        "v_dim": draw(st.sampled_from([k_dim, 24, 64])),
        "dtype": draw(st.sampled_from(list(naive.TOLERANCE))),
        "page_size": draw(st.sampled_from([1, 16, 64])),
        "gap": draw(st.sampled_from([1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "window": draw(st.none() | st.integers(1, 120)),
        "sinks": draw(st.booleans()),
        "positions_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_equals_the_definition(implementation: Prefill, case: dict) -> None:
    naive.assert_prefill_is_defined(implementation, *naive.prefill_call(case))


@pytest.mark.parametrize("window", [None, 700, 5000])
def test_tiles_and_chunks_change_nothing(implementation: Prefill, window: int | None) -> None:
    """A cached head longer than a tile of pages, and a chunk longer than the tiles of queries."""
    torch.manual_seed(0)
    sequence = naive.cached([[6000, 6000]], page_size=64, k_dim=16, v_dim=16, dtype=torch.float32)
    k, v = (torch.stack(tokens[0], 1) for tokens in (sequence.k, sequence.v))
    q = torch.randn(6000, 4, 16)
    options = {"scale": 0.5, "window": window}
    whole = implementation(q, k, v, None, positions=torch.arange(6000), **options)
    kv, at = sequence.kv, torch.arange(4500, 6000)
    past = PagedKV(kv.data, kv.format, kv.tables, torch.full_like(kv.lengths, 4500))
    rest = implementation(q[4500:], k[4500:], v[4500:], past, positions=at, **options)
    for one, other in zip(whole, rest, strict=True):
        torch.testing.assert_close(one[4500:], other, atol=1e-5, rtol=1e-5)
    for i in (4500, 5003, 5999):
        seen = slice(0 if window is None else max(0, i + 1 - window), i + 1)
        want, _ = naive.attend(q[i, 3], k[seen, 1], v[seen, 1], scale=0.5)
        torch.testing.assert_close(rest[0][i - 4500, 3].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_native_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """Another number of threads also makes other tiles of queries."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(300, heads, 40).to(dtype) for heads in (6, 2, 2))
    options = {"scale": 0.2, "positions": torch.arange(300), "backend": "native"}
    alone, together = on_threads(lambda: prefill(q, k, v, None, **options), 1, 4)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_strided_arguments(implementation: Prefill) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, heads, 20).permute(2, 1, 0) for heads in (4, 2, 2))
    options = {"scale": 0.2, "positions": torch.arange(20)}
    out, _ = implementation(q, k, v, None, **options)
    want, _ = implementation(q.contiguous(), k.contiguous(), v.contiguous(), None, **options)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(4, 2, 8)}, "prefill needs q"),
        ({"v": torch.zeros(3, 2, 8).half()}, "of one dtype"),
        ({"q": torch.zeros(3, 5, 8)}, "a multiple of kv_heads"),
        ({"positions": torch.arange(2)}, r"positions must be int32 or int64 \[3"),
        ({"window": 0}, "at least 1, got 0"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[4\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    arguments = {
        "q": torch.zeros(3, 4, 8),
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        "past": None,
        "scale": 1.0,
        "positions": torch.arange(3),
    }
    with pytest.raises(ValueError, match=message):
        prefill(**arguments | changes)


def test_a_past_of_other_heads_is_refused() -> None:
    past = naive.cached([[3, 3, 3]], page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
    q, k = torch.zeros(3, 6, 8), torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match="past must be one row of 2 KV heads"):
        prefill(q, k, k, past.kv, scale=1.0, positions=torch.arange(3, 6))
