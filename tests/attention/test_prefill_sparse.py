"""Sparse prefill equals attention over the pairs that its pattern names, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.attention import prefill
from tamis.attention.pattern import SparsePattern
from tests.attention import naive
from tests.threads import on_threads

Prefill = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=naive.BACKENDS, scope="session")
def implementation(request: pytest.FixtureRequest) -> Prefill:
    """Prefill by one backend and instruction set."""
    return naive.implementation("prefill", request.param)


def random_pattern(q_heads: int, tokens: int, keys: int, block: int, alike: int) -> SparsePattern:
    """Random blocks, columns, windows and full heads.

    Heads on end, `alike` of them, share most of their lists, and so do some adjacent query blocks;
    some blocks list nothing, and some keys that are listed lie after every query.
    """
    q_blocks, key_blocks = -(-tokens // block), -(-keys // block) + 1
    source = torch.arange(q_heads) // alike
    mask = torch.rand(q_heads, q_blocks, key_blocks) < torch.rand(q_heads, q_blocks, 1)
    mask = torch.where(torch.rand(q_heads, q_blocks, 1) < 0.3, mask, mask[source])
    mask[:, torch.rand(q_blocks) < 0.2] = False
    again = (torch.rand(q_blocks - 1) < 0.4).nonzero()[:, 0]
    mask[:, again + 1] = mask[:, again]
    counts = torch.randint(0, 30, (q_heads,)).tolist()
    columns = [torch.randperm(keys + 9)[:count] for count in counts]
    windows = torch.randint(0, keys, (q_heads,)) * (torch.rand(q_heads) < 0.5)
    full = torch.rand(q_heads) < 0.15
    sources = torch.where(torch.rand(3, q_heads) < 0.2, torch.arange(q_heads), source)
    return SparsePattern.from_blocks(
        mask,
        [columns[head] for head in sources[0].tolist()],
        block=block,
        window=windows[sources[1]].int(),
        full=full[sources[2]],
    )


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """What describes one sparse prefill call; `build` makes its tensors."""
    kv_heads = draw(st.integers(1, 3))
    k_dim = draw(st.sampled_from([8, 40, 64]))
    heads = st.lists(st.integers(0, 200), min_size=kv_heads, max_size=kv_heads)
    return {
        "tokens": draw(st.integers(1, 150)),
        "past": draw(st.none() | heads),
        "kv_heads": kv_heads,
        "group": draw(st.integers(1, 5)),
        "alike": draw(st.integers(1, 4)),
        "block": draw(st.sampled_from([1, 7, 16, 64, 300])),
        "k_dim": k_dim,
        "v_dim": draw(st.sampled_from([k_dim, 24])),
        "dtype": draw(st.sampled_from(list(naive.TOLERANCE))),
        "page_size": draw(st.sampled_from([1, 16, 64])),
        "gap": draw(st.sampled_from([1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "window": draw(st.none() | st.integers(1, 120)),
        "sinks": draw(st.booleans()),
        "positions_dtype": torch.int64,
        "seed": draw(st.integers(0, 1000)),
    }


def build(case: dict) -> tuple[tuple, dict]:
    """Positional arguments and options of a case."""
    arguments, options = naive.prefill_call(case)
    q, keys = arguments[0], case["tokens"] + max(case["past"] or [0])
    pattern = random_pattern(q.shape[1], case["tokens"], keys, case["block"], case["alike"])
    return arguments, options | {"pattern": pattern}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_equals_the_definition(implementation: Prefill, case: dict) -> None:
    naive.assert_prefill_is_defined(implementation, *build(case))


@pytest.fixture(scope="module")
def chunk() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, naive.Cached]:
    """600 tokens of 4 query and 2 KV heads after 700 and 333 cached ones: q, k, v, past."""
    torch.manual_seed(0)
    past = naive.cached([[700, 333]], page_size=64, k_dim=32, v_dim=32, dtype=torch.float32)
    return *(torch.randn(600, heads, 32) for heads in (4, 2, 2)), past


OPTIONS = {"scale": 0.2, "positions": torch.arange(700, 1300)}


def test_a_pattern_of_everything_is_dense_attention(implementation: Prefill, chunk: tuple) -> None:
    q, k, v, past = chunk
    dense = implementation(q, k, v, past.kv, **OPTIONS)
    everything = torch.ones(4, 10, 21, dtype=torch.bool)
    for pattern in (
        SparsePattern.from_blocks(everything),
        SparsePattern.from_blocks(~everything, [torch.arange(1300)] * 4),
        SparsePattern.from_blocks(~everything, window=torch.full((4,), 1300).int()),
        SparsePattern.from_blocks(~everything, full=torch.ones(4, dtype=torch.bool)),
    ):
        sparse = implementation(q, k, v, past.kv, **OPTIONS, pattern=pattern)
        for one, other in zip(sparse, dense, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_shape_is_sinks_and_a_window(implementation: Prefill, chunk: tuple) -> None:
    q, k, v, past = chunk
    pattern = SparsePattern.a_shape(4, 600, past.kv.lengths[0], sinks=5, window=130)
    out, lse = implementation(q, k, v, past.kv, **OPTIONS, pattern=pattern)
    for head, i in ((0, 0), (1, 599), (2, 63), (3, 300)):
        keys, values = (
            torch.cat([cached[0][head // 2], own[:, head // 2]])
            for cached, own in ((past.k, k), (past.v, v))
        )
        at = len(keys) - 600 + i
        seen = torch.cat([torch.arange(5), torch.arange(at - 129, at + 1)])
        want, want_lse = naive.attend(q[i, head], keys[seen], values[seen], scale=0.2)
        torch.testing.assert_close(out[i, head].double(), want, atol=1e-5, rtol=1e-5)
        assert lse[i, head].item() == pytest.approx(want_lse, abs=1e-5)


def test_a_query_that_sees_nothing_gives_zero(implementation: Prefill, chunk: tuple) -> None:
    q, k, v, past = chunk
    pattern = SparsePattern.from_blocks(torch.zeros(4, 10, 1, dtype=torch.bool))
    out, lse = implementation(q, k, v, past.kv, **OPTIONS, pattern=pattern)
    assert not out.any()
    assert (lse == -torch.inf).all()
    sinks = torch.randn(4)
    out, lse = implementation(q, k, v, past.kv, **OPTIONS, pattern=pattern, sinks=sinks)
    assert not out.any()
    torch.testing.assert_close(lse, sinks.expand(600, 4))


@pytest.mark.parametrize("isa", naive.BACKENDS[1:])
@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_native_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    """Another number of threads also makes other tiles of queries."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(500, heads, 40).to(dtype) for heads in (6, 2, 2))
    blocks = (torch.rand(2, 8, 8) < 0.3).repeat_interleave(3, 0)
    columns = [torch.tensor([3, 99])] * 6
    windows = torch.tensor([170, 170, 170, 60, 60, 300]).int()
    options = {
        "scale": 0.2,
        "positions": torch.arange(500),
        "pattern": SparsePattern.from_blocks(blocks, columns, window=windows),
    }
    run = naive.implementation("prefill", isa)
    alone, together = on_threads(lambda: run(q, k, v, None, **options), 1, 16)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.usefixtures("extension")
def test_strided_lists_are_read_as_they_are(chunk: tuple) -> None:
    q, k, v, past = chunk
    pattern = random_pattern(4, 600, 1300, 64, 1)
    strided = {
        name: torch.stack([getattr(pattern, name)] * 2, -1)[..., 0]
        for name in ("block_starts", "blocks", "column_starts", "columns", "window", "full")
    }
    run = naive.implementation("prefill", "portable")
    out, _ = run(q, k, v, past.kv, **OPTIONS, pattern=SparsePattern(64, **strided))
    want, _ = run(q, k, v, past.kv, **OPTIONS, pattern=pattern)
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 3), "4 heads and 3 query blocks, got 2 and 3"), ((4, 2), "got 4 and 2")],
)
def test_a_pattern_of_another_shape_is_refused(shape: tuple[int, int], message: str) -> None:
    q, k = torch.zeros(130, 4, 8), torch.zeros(130, 2, 8)
    pattern = SparsePattern.from_blocks(torch.ones(*shape, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        prefill(q, k, k, None, scale=1.0, positions=torch.arange(130), pattern=pattern)
