"""How long the Triton kernels take, beside torch's attention and what the device allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from gpu_pages import PAGE_SIZE, dense_pages, encoded_pages
from tamis.attention import decode, observe, prefill
from tamis.attention.encoded import decode_encoded
from tamis.attention.pattern import SparsePattern
from tamis.cache.format import Field, PagedKV
from tamis.cache.moves import append
from tamis.methods.codec.gear import GEAR
from tamis.methods.codec.kivi import KIVI
from tamis.methods.codec.think import ThinK
from timing import Spread, in_turns

CODECS = {
    "kivi 8": KIVI(bits=8),
    "kivi 4": KIVI(bits=4),
    "kivi 3": KIVI(bits=3),
    "kivi 2": KIVI(bits=2),
    "kivi 1": KIVI(bits=1),
    "gear 4": GEAR(),
    "think": ThinK(),
}

Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        context: tokens that decode reads; rows: sequences of the larger batches.
        tokens: of a prompt that is prefilled at once; chunk: of one after `context` tokens.
        kv_heads: KV heads.
        copied: bytes whose copy shows the memory's bandwidth; square: extent of the matrices whose
            product shows the matmul peak.
        swapped: bytes that go to host memory and come back.
        rounds: samples; seconds: of repeated runs in a sample.
    """

    context: int = 32_768
    rows: int = 8
    tokens: int = 8192
    chunk: int = 2048
    kv_heads: int = 8
    copied: int = 1 << 30
    square: int = 8192
    swapped: int = 1 << 30
    rounds: int = 7
    seconds: float = 0.02

    @classmethod
    def tiny(cls) -> Sizes:
        """Sizes that prove nothing but that everything runs."""
        return cls(64, 1, 64, 32, 2, 1 << 16, 64, 1 << 20, rounds=1, seconds=0)


@dataclass(frozen=True)
class Rates:
    """What limits the device, measured.

    Attributes:
        copy_bytes_per_s: bytes read and written by a copy within its memory.
        matmul_flops: of square matrices, operations per second by dtype.
    """

    copy_bytes_per_s: float
    matmul_flops: dict[str, float]


@dataclass(frozen=True)
class Timing:
    """One kernel at one size.

    Attributes:
        settings: of the size.
        ms: by who computes it, "tamis" first; milliseconds.
        limit_ms: bytes that must be moved over the bandwidth, or operations over the matmul peak.
        errors: why somebody has no time.
    """

    name: str
    settings: dict[str, Any]
    ms: dict[str, Spread]
    limit_ms: float
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def of_limit(self) -> float | None:
        """The share of what the device allows: 1 is as fast as that."""
        return self.limit_ms / self.ms["tamis"].median if "tamis" in self.ms else None

    @property
    def overlap(self) -> float | None:
        """Of copies and work that were timed alone too, the share of the shorter that ran beside
        the longer."""
        if not {"tamis", "copies", "work"} <= set(self.ms):
            return None
        both, *alone = (self.ms[name].median for name in ("tamis", "copies", "work"))
        return (sum(alone) - both) / min(alone)

    def ratio(self, other: str) -> float | None:
        """How many times as fast tamis is."""
        if other not in self.ms or "tamis" not in self.ms:
            return None
        return self.ms[other].median / self.ms["tamis"].median


@dataclass(frozen=True)
class Item:
    """What is timed together.

    Attributes:
        runs: by name, "tamis" first.
        moved: bytes that must be read and written; operations: that must be done. One of them is 0.
    """

    settings: dict[str, Any]
    runs: Mapping[str, Run]
    moved: float = 0
    operations: float = 0
    dtype: torch.dtype = torch.bfloat16


def measure_rates(sizes: Sizes, device: str) -> Rates:
    """The best of some samples: whatever else runs can only lower them."""
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = min(_sample(lambda: target.copy_(source), device, sizes.seconds) for _ in range(5))
    flops = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        square = torch.randn(sizes.square, sizes.square, device=device).to(dtype)
        product = partial(torch.matmul, square, square)
        best = min(_sample(product, device, sizes.seconds) for _ in range(3))
        flops[_name(dtype)] = 2 * sizes.square**3 / best
    return Rates(2 * sizes.copied / copy_s, flops)


def time_item(
    name: str, build: Callable[[], Item], rates: Rates, sizes: Sizes, device: str
) -> Timing:
    """Medians of interleaved runs; who fails has an error in place of a time."""
    item = build()
    works: dict[str, Callable[[], float]] = {}
    errors: dict[str, str] = {}
    for who, run in item.runs.items():
        try:
            _sample(run, device, 0)  # compiles
        except Exception as error:  # one who cannot run must not keep the others from it
            errors[who] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            works[who] = partial(_sample, run, device, sizes.seconds)
    samples = in_turns(works, sizes.rounds)
    limit_s = item.moved / rates.copy_bytes_per_s
    if item.operations:
        limit_s = item.operations / rates.matmul_flops[_name(item.dtype)]
    ms = {who: Spread.of([1e3 * s for s in taken]) for who, taken in samples.items()}
    return Timing(name, item.settings, ms, 1e3 * limit_s, errors)


def items(sizes: Sizes, device: str) -> Iterator[tuple[str, Callable[[], Item]]]:
    """What is timed, the most important first; tensors are made when it is its turn."""
    many = sizes.rows
    yield "decode", partial(_decode, sizes, device, 1)
    yield "decode, batch", partial(_decode, sizes, device, many)
    yield "prefill", partial(_prefill, sizes, device)
    for name in CODECS:
        yield f"decode, {name}", partial(_encoded, sizes, device, name)
    yield "prefill, chunk after a context", partial(_prefill_chunk, sizes, device)
    yield "prefill, 10 % of the blocks", partial(_prefill_sparse, sizes, device)
    yield "append", partial(_append, sizes, device)
    yield "column_sums", partial(_column_sums, sizes, device)
    yield "window_weights of 64", partial(_window_weights, sizes, device)
    yield "decode_weights", partial(_decode_weights, sizes, device)
    yield "top_pages", partial(_top_pages, sizes, device)
    yield "decode, batch, fp16", partial(_decode, sizes, device, many, dtype=torch.float16)
    yield "decode, batch, GQA 1", partial(_decode, sizes, device, many, group=1)
    yield "decode, batch, heads of 64", partial(_decode, sizes, device, many, dim=64, group=8)
    yield "prefill, heads of 64", partial(_prefill, sizes, device, dim=64)
    yield "prefill, fp16", partial(_prefill, sizes, device, dtype=torch.float16)


def _decode(
    sizes: Sizes,
    device: str,
    rows: int,
    *,
    dim: int = 128,
    group: int = 4,
    dtype: torch.dtype = torch.bfloat16,
) -> Item:
    heads, context = sizes.kv_heads, sizes.context
    kv = dense_pages([[context] * heads] * rows, dim, dtype, device)
    q = torch.randn(rows, heads * group, dim, device=device).to(dtype)
    k, v = (torch.randn(rows, heads, context, dim, device=device).to(dtype) for _ in "kv")
    runs = {
        "tamis": partial(decode, q, kv, scale=dim**-0.5, backend="triton"),
        "SDPA": partial(scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True),
        "FlexAttention": partial(_flex(device), q[:, :, None], k, v, enable_gqa=True),
    }
    settings = {"rows": rows, "context": context, "head_dim": dim, "gqa": group}
    settings |= {"kv_heads": heads, "dtype": _name(dtype)}
    return Item(settings, runs, moved=k.nbytes + v.nbytes, dtype=dtype)


def _encoded(sizes: Sizes, device: str, codec_name: str) -> Item:
    codec, dim, rows = CODECS[codec_name], 128, sizes.rows
    dtype, heads = torch.bfloat16, sizes.kv_heads
    counts = [[sizes.context // PAGE_SIZE] * heads] * rows
    kv = encoded_pages(codec, counts, dim, dtype, device)
    dense = dense_pages([[sizes.context] * heads] * rows, dim, dtype, device)
    q = torch.randn(rows, heads * 4, dim, device=device).to(dtype)
    encoding = codec.encoding()
    runs = {
        "tamis": partial(decode_encoded, q, kv, encoding, scale=dim**-0.5, backend="triton"),
        "tamis, bf16 pages": partial(decode, q, dense, scale=dim**-0.5, backend="triton"),
    }
    settings = {"rows": rows, "context": sizes.context, "head_dim": dim, "gqa": 4}
    return Item(settings | {"kv_heads": heads}, runs, moved=kv.data.nbytes)


def _prefill(
    sizes: Sizes, device: str, *, dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Item:
    heads, group, tokens = sizes.kv_heads, 4, sizes.tokens
    q, k, v = _chunk(tokens, heads, group, dim, dtype, device)
    at = torch.arange(tokens, device=device)
    apart = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    mask = create_block_mask(_causal, None, None, tokens, tokens, device=device)
    runs = {
        "tamis": partial(prefill, q, k, v, None, scale=dim**-0.5, positions=at, backend="triton"),
        "SDPA": partial(scaled_dot_product_attention, *apart, is_causal=True, enable_gqa=True),
        "FlexAttention": partial(_flex(device), *apart, block_mask=mask, enable_gqa=True),
    }
    settings = {"tokens": tokens, "head_dim": dim, "gqa": group, "kv_heads": heads}
    operations = 4 * heads * group * dim * (tokens * (tokens + 1) // 2)
    return Item(settings | {"dtype": _name(dtype)}, runs, operations=operations, dtype=dtype)


def _prefill_chunk(sizes: Sizes, device: str) -> Item:
    heads, group, dim, tokens = sizes.kv_heads, 4, 128, sizes.chunk
    dtype, past = torch.bfloat16, sizes.context
    q, k, v = _chunk(tokens, heads, group, dim, dtype, device)
    kv = dense_pages([[past] * heads], dim, dtype, device)
    at = torch.arange(past, past + tokens, device=device)
    apart = [torch.randn(1, heads, past + tokens, dim, device=device).to(dtype) for _ in "kv"]
    seen = torch.arange(past + tokens, device=device) <= at[:, None]
    runs = {
        "tamis": partial(prefill, q, k, v, kv, scale=dim**-0.5, positions=at, backend="triton"),
        "SDPA": partial(
            scaled_dot_product_attention,
            q.transpose(0, 1)[None].contiguous(),
            *apart,
            attn_mask=seen,
            enable_gqa=True,
        ),
    }
    settings = {"tokens": tokens, "past": past, "head_dim": dim, "gqa": group, "kv_heads": heads}
    pairs = tokens * past + tokens * (tokens + 1) // 2
    return Item(settings, runs, operations=4 * heads * group * dim * pairs)


def _prefill_sparse(sizes: Sizes, device: str) -> Item:
    heads, group, dim, tokens = sizes.kv_heads, 4, 128, 2 * sizes.tokens
    dtype = torch.bfloat16
    q, k, v = _chunk(tokens, heads, group, dim, dtype, device)
    at = torch.arange(tokens, device=device)
    blocks = -(-tokens // 64)
    mask = torch.rand(heads * group, blocks, blocks, device=device) < 0.1
    mask |= torch.eye(blocks, dtype=torch.bool, device=device)
    pattern = SparsePattern.from_blocks(mask.tril())
    attend = partial(prefill, q, k, v, None, scale=dim**-0.5, positions=at, backend="triton")
    density = pattern.density(torch.zeros(heads, dtype=torch.int64), tokens)
    runs = {"tamis": partial(attend, pattern=pattern), "tamis, dense": attend}
    settings = {"tokens": tokens, "density": density, "head_dim": dim, "gqa": group}
    pairs = density * (tokens * (tokens + 1) // 2)
    return Item(settings, runs, operations=4 * heads * group * dim * pairs)


def _append(sizes: Sizes, device: str) -> Item:
    heads, dim, tokens, dtype = sizes.kv_heads, 128, sizes.tokens, torch.bfloat16
    kv = dense_pages([[tokens] * heads], dim, dtype, device)
    _, k, v = _chunk(tokens, heads, 1, dim, dtype, device)
    at = torch.arange(tokens, dtype=torch.int32, device=device)
    starts = torch.tensor([0, tokens], device=device)
    before = torch.zeros_like(kv.lengths)
    arguments = kv.data, kv.format, kv.tables, before, starts, k, v, at
    runs = {
        "tamis": partial(append, *arguments, backend="triton"),
        "torch": partial(append, *arguments, backend="reference"),
    }
    settings = {"tokens": tokens, "head_dim": dim, "kv_heads": heads}
    return Item(settings, runs, moved=2 * (k.nbytes + v.nbytes))


def _column_sums(sizes: Sizes, device: str) -> Item:
    heads, group, dim, tokens = sizes.kv_heads, 4, 128, sizes.tokens
    q, k, v = _chunk(tokens, heads, group, dim, torch.bfloat16, device)
    kv = dense_pages([[tokens] * heads], dim, torch.bfloat16, device)
    at = torch.arange(tokens, device=device)
    lse = torch.full((tokens, heads * group), 9.0, device=device)
    how: dict[str, Any] = {"scale": dim**-0.5, "positions": at, "backend": "triton"}
    runs = {
        "tamis": partial(observe.column_sums, q, kv, lse, **how),
        "tamis, prefill": partial(prefill, q, k, v, None, **how),
    }
    settings = {"tokens": tokens, "head_dim": dim, "gqa": group, "kv_heads": heads}
    operations = 2 * heads * group * dim * (tokens * (tokens + 1) // 2)
    return Item(settings, runs, operations=operations)


def _window_weights(sizes: Sizes, device: str) -> Item:
    kv, q = _context(sizes, device, 1, queries=64)
    at = torch.arange(sizes.context - 64, sizes.context, device=device)
    run = partial(observe.window_weights, q, kv, scale=0.1, positions=at, backend="triton")
    settings = {"queries": 64, "context": sizes.context, "kv_heads": sizes.kv_heads, "gqa": 4}
    weights = 4 * q.shape[0] * q.shape[1] * sizes.context
    return Item(settings, {"tamis": run}, moved=kv.data.nbytes / 2 + weights)


def _decode_weights(sizes: Sizes, device: str) -> Item:
    kv, q = _context(sizes, device, sizes.rows)
    lse = torch.full(q.shape[:2], 9.0, device=device)
    how: dict[str, Any] = {"scale": 0.1, "backend": "triton"}
    runs = {
        "tamis": partial(observe.decode_weights, q, kv, lse, **how),
        "tamis, decode": partial(decode, q, kv, **how),
    }
    settings = {"rows": sizes.rows, "context": sizes.context, "kv_heads": sizes.kv_heads, "gqa": 4}
    weights = 4 * q.shape[0] * q.shape[1] * sizes.context
    return Item(settings, runs, moved=kv.data.nbytes / 2 + weights)


def _top_pages(sizes: Sizes, device: str) -> Item:
    bounds = [Field(name, torch.bfloat16, 128, 1) for name in ("least", "most")]
    kv, q = _context(sizes, device, sizes.rows, columns=bounds)
    count = max(1, sizes.context // PAGE_SIZE // 8)
    choose = partial(observe.top_pages, q, kv, count, low="least", high="most", backend="triton")
    runs = {"tamis": choose, "tamis, decode": partial(decode, q, kv, scale=0.1, backend="triton")}
    settings = {"rows": sizes.rows, "context": sizes.context, "pages": count}
    pages = kv.lengths.numel() * sizes.context // PAGE_SIZE
    return Item(settings, runs, moved=pages * 2 * 128 * 2)


def _context(
    sizes: Sizes, device: str, rows: int, *, queries: int | None = None, columns: Any = ()
) -> tuple[PagedKV, torch.Tensor]:
    """Pages of `context` tokens of some rows in bf16, and queries: of each row, or so many."""
    lengths = [[sizes.context] * sizes.kv_heads] * rows
    kv = dense_pages(lengths, 128, torch.bfloat16, device, columns=columns)
    n = rows if queries is None else queries
    return kv, torch.randn(n, 4 * sizes.kv_heads, 128, device=device).bfloat16()


def _chunk(
    tokens: int, heads: int, group: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a chunk, tokens first."""
    shapes = ((tokens, heads * group, dim), (tokens, heads, dim), (tokens, heads, dim))
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return q, k, v


def _flex(device: str) -> Callable[..., object]:
    """FlexAttention, compiled for a GPU."""
    if device != "cuda":
        return flex_attention
    torch.compiler.reset()  # or after some shapes it would no longer be compiled
    compiled: Callable[..., object] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _causal(b: Any, h: Any, q_at: Any, k_at: Any) -> Any:
    return q_at >= k_at


def _sample(run: Run, device: str, seconds: float) -> float:
    """Seconds of one run, by as many in a row as fill `seconds`, after one that is not counted;
    for 0 seconds just one."""
    once = _seconds(run, device, 1)
    return _seconds(run, device, max(1, int(seconds / once))) if seconds else once


def _seconds(run: Run, device: str, repeats: int) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / repeats


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
