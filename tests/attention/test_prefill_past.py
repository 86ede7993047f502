"""Prefill with own=False equals attention over the cached tokens alone, by its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import merge_states, prefill
from tamis.attention.pattern import SparsePattern
from tests.attention import naive
from tests.threads import on_threads

Prefill = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=naive.BACKENDS, scope="session")
def implementation(request: pytest.FixtureRequest) -> Prefill:
    """Prefill by one backend and instruction set."""
    return naive.implementation("prefill", request.param)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """What describes one call; the test makes its tensors."""
    kv_heads = draw(st.integers(1, 3))
    k_dim = draw(st.sampled_from([8, 40, 64]))
    return {
        "tokens": draw(st.integers(1, 70)),
        "lengths": draw(st.lists(st.integers(0, 300), min_size=kv_heads, max_size=kv_heads)),
        "group": draw(st.integers(1, 5)),
        "k_dim": k_dim,
        "v_dim": draw(st.sampled_from([k_dim, 24])),
        "dtype": draw(st.sampled_from(list(naive.TOLERANCE))),
        "page_size": draw(st.sampled_from([1, 16, 64])),
        "gap": draw(st.sampled_from([1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "window": draw(st.none() | st.integers(1, 200)),
        "sinks": draw(st.booleans()),
        "has_chunk": draw(st.booleans()),
        "first": draw(st.sampled_from([None, 0])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_equals_the_definition(implementation: Prefill, case: dict) -> None:
    """Each query sees what one that decodes would, wherever the chunk lies among the cached tokens.

    Keys and values of the chunk are NaN, so that reading them shows.
    """
    torch.manual_seed(case["seed"])
    tokens, lengths, dtype = case["tokens"], case["lengths"], case["dtype"]
    names = ("page_size", "k_dim", "v_dim", "dtype", "gap")
    past = naive.cached([lengths], **{name: case[name] for name in names})
    q_heads, given_tokens = len(lengths) * case["group"], tokens if case["has_chunk"] else 0
    q = torch.randn(tokens, q_heads, case["k_dim"]).to(dtype)
    k, v = (
        torch.full((given_tokens, len(lengths), case[name]), torch.nan, dtype=dtype)
        for name in ("k_dim", "v_dim")
    )
    after = max(int(at[-1]) + 1 if len(at) else 0 for at in past.positions[0])
    first = after if case["first"] is None else case["first"]
    options = {
        "scale": case["k_dim"] ** -0.5,
        "positions": torch.arange(first, first + tokens),
        "window": case["window"],
        "softcap": case["softcap"],
        "sinks": torch.randn(q_heads) if case["sinks"] else None,
    }
    out, lse = implementation(q, k, v, past.kv, own=False, **options)
    rows = {name: getattr(past, name) * tokens for name in ("k", "v", "positions")}
    want_out, want_lse = naive.decode(q, replace(past, **rows), **options)
    assert out.dtype == dtype
    tolerance = naive.TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), want_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 40, 1000])
def test_past_and_chunk_merge_to_the_whole(implementation: Prefill, window: int | None) -> None:
    """With more queries than a tile of the reference has."""
    torch.manual_seed(0)
    past = naive.cached([[900, 0]], page_size=16, k_dim=16, v_dim=24, dtype=torch.float32)
    q, k, v = torch.randn(600, 4, 16), torch.randn(600, 2, 16), torch.randn(600, 2, 24)
    options = {"scale": 0.25, "positions": torch.arange(900, 1500), "window": window}
    before = implementation(q, k, v, past.kv, own=False, **options)
    chunk = implementation(q, k, v, None, **options)
    whole = implementation(q, k, v, past.kv, **options)
    for one, other in zip(merge_states(*before, *chunk), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [None, [0, 0]])
def test_without_past_only_sinks_are_seen(
    implementation: Prefill, lengths: list[int] | None
) -> None:
    past = None
    if lengths is not None:
        pages = {"page_size": 4, "k_dim": 8, "v_dim": 8}
        past = naive.cached([lengths], dtype=torch.float32, **pages).kv
    q, k = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    options = {"scale": 1.0, "positions": torch.arange(5), "own": False}
    for logits in (None, sinks):
        out, lse = implementation(q, k, k, past, sinks=logits, **options)
        assert torch.equal(out, torch.zeros(5, 4, 8))
        want = torch.full((4,), -torch.inf) if logits is None else logits
        torch.testing.assert_close(lse, want.expand(5, 4))


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_native_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """Another number of threads also makes other tiles of queries."""
    torch.manual_seed(1)
    past = naive.cached([[500, 70]], page_size=16, k_dim=40, v_dim=40, dtype=dtype).kv
    q, empty = torch.randn(300, 6, 40).to(dtype), torch.empty(0, 2, 40, dtype=dtype)
    at = torch.arange(500, 800)
    options = {"scale": 0.2, "positions": at, "window": 450, "own": False, "backend": "native"}
    alone, together = on_threads(lambda: prefill(q, empty, empty, past, **options), 1, 4)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_public_function_reads_past_alone(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "native":
        request.getfixturevalue("extension")
    torch.manual_seed(2)
    past = naive.cached([[9, 3]], page_size=4, k_dim=8, v_dim=8, dtype=torch.float32)
    q, empty = torch.randn(3, 4, 8), torch.empty(0, 2, 8)
    options = {"scale": 1.0, "positions": torch.arange(9, 12)}
    out, _ = prefill(q, empty, empty, past.kv, own=False, backend=backend, **options)
    want, _ = naive.attend(q[2, 3], past.k[0][1], past.v[0][1], scale=1.0)
    torch.testing.assert_close(out[2, 3].double(), want, atol=1e-5, rtol=1e-5)


def test_a_chunk_that_is_seen_needs_its_keys() -> None:
    q, empty = torch.zeros(3, 4, 8), torch.empty(0, 2, 8)
    with pytest.raises(ValueError, match="prefill needs q"):
        prefill(q, empty, empty, None, scale=1.0, positions=torch.arange(3))


def test_as_many_keys_as_queries_or_none() -> None:
    q, k = torch.zeros(3, 4, 8), torch.zeros(2, 2, 8)
    with pytest.raises(ValueError, match="prefill needs q"):
        prefill(q, k, k, None, scale=1.0, positions=torch.arange(3), own=False)


def test_a_pattern_needs_the_chunk() -> None:
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    pattern = SparsePattern.from_blocks(torch.ones(4, 1, 1, dtype=torch.bool), block=16)
    options = {"pattern": pattern, "own": False}
    with pytest.raises(ValueError, match="own must be True"):
        prefill(q, k, k, None, scale=1.0, positions=torch.arange(3), **options)
