"""The Triton kernels equal attention by its definition; here under Triton's interpreter, in which
a program takes milliseconds, so sizes are small."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tamis import attention
from tamis.attention import observe_reference
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.errors import ConfigError
from tamis.platform import triton_installed
from tests.attention import naive

pytestmark = pytest.mark.skipif(not triton_installed(), reason="Triton is not installed")


@pytest.fixture(scope="module")
def gpu() -> SimpleNamespace:
    """The kernels, interpreted unless there is a GPU (see tests/conftest.py)."""
    from tamis.attention.gpu import decode, observe, prefill

    return SimpleNamespace(decode=decode.decode, prefill=prefill.prefill, observe=observe)


def close(
    got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> None:
    tolerance = naive.TOLERANCE[dtype]
    torch.testing.assert_close(got[0].double(), want[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1].double(), want[1], atol=1e-5, rtol=1e-5)


def check_statistic(gpu: SimpleNamespace, name: str, *arguments: Any, **options: Any) -> None:
    """A function of `observe` equals that of the reference."""
    got = getattr(gpu.observe, name)(*arguments, **options)
    want = getattr(observe_reference, name)(*arguments, **options)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", naive.TOLERANCE)
@pytest.mark.parametrize(
    ("dims", "group", "window", "softcap", "sinks"),
    [((40, 24), 3, None, None, False), ((64, 64), 4, 100, 2.0, True), ((8, 96), 1, 7, None, True)],
)
def test_decode(
    gpu: SimpleNamespace,
    dtype: torch.dtype,
    dims: tuple[int, int],
    group: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
) -> None:
    torch.manual_seed(0)
    k_dim, v_dim = dims
    lengths = [[700, 5, 0], [0, 64, 513]]
    cached = naive.cached(lengths, page_size=16, k_dim=k_dim, v_dim=v_dim, dtype=dtype)
    q = torch.randn(2, 3 * group, k_dim).to(dtype)
    options = {
        "scale": k_dim**-0.5,
        "positions": torch.tensor([705, 520]),
        "window": window,
        "softcap": softcap,
        "sinks": torch.randn(3 * group) if sinks else None,
    }
    close(gpu.decode(q, cached.kv, **options), naive.decode(q, cached, **options), dtype)


def test_decode_over_a_list_of_tokens(gpu: SimpleNamespace) -> None:
    torch.manual_seed(0)
    cached = naive.cached(
        [[600, 70], [0, 9]], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32
    )
    indices = torch.stack([torch.randperm(600)[:590].sort().values for _ in range(4)])
    indices = indices.int().view(2, 2, 590)
    indices[0, 1, :20] = torch.randperm(70)[:20].sort().values
    indices[1, 1, :3] = torch.tensor([0, 4, 8])
    tokens = TokenList(indices, torch.tensor([[590, 20], [0, 3]], dtype=torch.int32))
    q = torch.randn(2, 4, 32)
    want = attention.decode(q, cached.kv, scale=0.2, tokens=tokens, backend="reference")
    got = gpu.decode(q, cached.kv, scale=0.2, tokens=tokens)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_decode_does_not_depend_on_the_batch(gpu: SimpleNamespace) -> None:
    torch.manual_seed(0)
    cached = naive.cached(
        [[600, 70], [33, 9]], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32
    )
    q = torch.randn(2, 4, 32)
    both = gpu.decode(q, cached.kv, scale=0.2)
    alone = gpu.decode(
        q[:1],
        replace(cached.kv, tables=cached.kv.tables[:1], lengths=cached.kv.lengths[:1]),
        scale=0.2,
    )
    for of_both, of_one in zip(both, alone, strict=True):
        assert torch.equal(of_both[:1], of_one)


def test_nan_is_not_hidden(gpu: SimpleNamespace) -> None:
    cached = naive.cached([[50]], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32)
    q = torch.randn(1, 2, 32)
    q[0, 0] = torch.nan
    out, lse = gpu.decode(q, cached.kv, scale=1.0)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan()
    assert not out[0, 1].isnan().any()


@pytest.mark.parametrize("dtype", naive.TOLERANCE)
@pytest.mark.parametrize(
    ("past", "window", "softcap", "sinks"),
    [(None, None, None, False), ([90, 0], 30, None, True), ([17, 64], None, 2.0, False)],
)
def test_prefill(
    gpu: SimpleNamespace,
    dtype: torch.dtype,
    past: list[int] | None,
    window: int | None,
    softcap: float | None,
    sinks: bool,
) -> None:
    torch.manual_seed(0)
    before = None
    if past is not None:
        before = naive.cached([past], page_size=16, k_dim=40, v_dim=24, dtype=dtype)
    q = torch.randn(100, 4, 40).to(dtype)
    k, v = torch.randn(100, 2, 40).to(dtype), torch.randn(100, 2, 24).to(dtype)
    options = {
        "scale": 0.2,
        "positions": torch.arange(max(past or [0]), max(past or [0]) + 100),
        "window": window,
        "softcap": softcap,
        "sinks": torch.randn(4) if sinks else None,
    }
    pages = before.kv if before is not None else None
    close(gpu.prefill(q, k, v, pages, **options), naive.prefill(q, k, v, before, **options), dtype)


def test_prefill_over_the_past_alone(gpu: SimpleNamespace) -> None:
    torch.manual_seed(0)
    cached = naive.cached([[70, 3]], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32)
    q, k = torch.randn(20, 4, 32), torch.randn(0, 2, 32)
    options = {"scale": 0.2, "positions": torch.arange(70, 90), "own": False}
    want = attention.prefill(q, k, k, cached.kv, backend="reference", **options)
    got = gpu.prefill(q, k, k, cached.kv, **options)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_wide_heads_have_smaller_tiles(gpu: SimpleNamespace) -> None:
    torch.manual_seed(0)
    cached = naive.cached([[90, 40]], page_size=16, k_dim=256, v_dim=256, dtype=torch.float32)
    q, k = torch.randn(70, 4, 256), torch.randn(70, 2, 256)
    how = {"scale": 0.06, "positions": torch.arange(90, 160)}
    close(
        gpu.prefill(q, k, k, cached.kv, **how), naive.prefill(q, k, k, cached, **how), torch.float32
    )
    close(
        gpu.decode(q[:1], cached.kv, scale=0.06),
        naive.decode(q[:1], cached, scale=0.06),
        torch.float32,
    )
    check_statistic(gpu, "chunk_scores", q, cached.kv, 90, **how, window=None, softcap=None)


@pytest.mark.parametrize("block", [16, 64, 100])
@pytest.mark.parametrize("past", [None, [40, 130]])
def test_prefill_by_a_pattern(gpu: SimpleNamespace, block: int, past: list[int] | None) -> None:
    """Blocks, columns, windows and a head that sees all; what is named twice counts once."""
    torch.manual_seed(block)
    tokens, keys = 120, 120 + max(past or [0])
    before = None
    if past is not None:
        before = naive.cached([past], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32)
    mask = torch.rand(4, -(-tokens // block), -(-keys // block) + 1) < 0.4
    pattern = SparsePattern.from_blocks(
        mask,
        [torch.randperm(keys + 9)[:n] for n in (0, 70, 5, 3)],
        block=block,
        window=torch.tensor([9, 0, 70, 5], dtype=torch.int32),
        full=torch.tensor([False, False, False, True]),
    )
    q, k, v = torch.randn(tokens, 4, 32), torch.randn(tokens, 2, 32), torch.randn(tokens, 2, 32)
    options = {"scale": 0.2, "positions": torch.arange(keys - tokens, keys), "pattern": pattern}
    pages = before.kv if before is not None else None
    close(
        gpu.prefill(q, k, v, pages, **options),
        naive.prefill(q, k, v, before, **options),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", naive.TOLERANCE)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (70, 2.0)])
def test_statistics_of_a_chunk(
    gpu: SimpleNamespace, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    kv = naive.cached([[300, 150]], page_size=16, k_dim=40, v_dim=24, dtype=dtype).kv
    q, lse = torch.randn(90, 6, 40).to(dtype), torch.randn(90, 6) + 5
    lse[3, 2] = -torch.inf
    options = {
        "scale": 0.2,
        "positions": torch.arange(210, 300),
        "window": window,
        "softcap": softcap,
    }
    check_statistic(gpu, "chunk_scores", q, kv, 300, **options)
    check_statistic(gpu, "column_sums", q, kv, lse, 300, **options)


@pytest.mark.parametrize("dtype", naive.TOLERANCE)
def test_statistics_of_single_queries(gpu: SimpleNamespace, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv = naive.cached([[300, 150], [0, 20]], page_size=16, k_dim=40, v_dim=24, dtype=dtype).kv
    q, lse = torch.randn(2, 6, 40).to(dtype), torch.randn(2, 6) + 3
    how, positions = {"scale": 0.3, "softcap": None}, torch.tensor([250, 300])
    check_statistic(gpu, "decode_scores", q, kv, 300, **how)
    check_statistic(gpu, "decode_weights", q, kv, lse, 300, positions=positions, window=70, **how)


def test_the_public_functions_run_it_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = naive.cached([[20]], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32).kv
    q = torch.randn(1, 2, 32)
    want, _ = attention.decode(q, kv, scale=1.0)
    monkeypatch.setenv("TAMIS_BACKEND", "triton")
    torch.testing.assert_close(attention.decode(q, kv, scale=1.0)[0], want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = naive.cached([[20]], page_size=16, k_dim=32, v_dim=32, dtype=torch.float32).kv
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="not on a CUDA device"):
        attention.decode(torch.randn(1, 2, 32), kv, scale=1.0, backend="triton")
    assert not attention.backends()["triton"]
