"""Whether every Triton kernel gives what the reference backend gives, on random shapes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gpu_pages import dense_pages, encoded_pages
from tamis.attention import decode, observe, prefill
from tamis.attention.encoded import decode_encoded
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.cache import BatchView, CacheLayout, LayerShape, PagedCache
from tamis.cache.format import Field
from tamis.cache.moves import append
from tamis.cache.transfers import Transfers
from tamis.methods.codec.gear import GEAR
from tamis.methods.codec.kivi import KIVI
from tamis.methods.codec.think import ThinK

Tensors = tuple[torch.Tensor, ...]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""What rounding may cost a result of size 1: absolute, and relative to larger ones."""

KV_HEADS = 2


@dataclass(frozen=True)
class Case:
    """Shapes that a kernel is checked on.

    Attributes:
        dim: of a head; group: query heads per KV head.
        most: the longest context, in tokens; shorter ones and an empty one are among them.
        chunk: tokens of a prompt's chunk.
    """

    dtype: torch.dtype
    dim: int
    group: int
    most: int
    chunk: int
    device: str

    @property
    def q_heads(self) -> int:
        """Query heads."""
        return KV_HEADS * self.group

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.dim**-0.5

    def lengths(self, rows: int) -> list[list[int]]:
        """Random lengths of some rows' heads, the longest and an empty one among them."""
        source = random.Random(rows * self.dim + self.group)
        drawn = [[source.randint(1, self.most) for _ in range(KV_HEADS)] for _ in range(rows)]
        drawn[0][0] = self.most
        drawn[-1][-1] = 0
        return drawn

    def normal(self, *shape: int) -> torch.Tensor:
        """Random numbers."""
        return torch.randn(shape, device=self.device).to(self.dtype)


@dataclass(frozen=True)
class Check:
    """What came of one check.

    Attributes:
        error: the largest difference from the reference.
        passed: whether all differences are within the tolerance.
        message: what went wrong, where nothing could be compared.
    """

    kernel: str
    dtype: str
    dim: int
    group: int
    error: float
    tolerance: float
    passed: bool
    message: str = ""


def run(kernel: str, case: Case) -> Check:
    """Check one of KERNELS on one case, from fixed seeds."""
    tolerance = TOLERANCE[case.dtype]
    if kernel in EXACT or kernel in IN_FP32:
        tolerance = 0.0 if kernel in EXACT else 1e-3
    of = kernel, str(case.dtype).removeprefix("torch."), case.dim, case.group
    try:
        got, want = (KERNELS[kernel](case, backend) for backend in ("triton", "reference"))
    except Exception as failure:  # a kernel that does not compile must not keep others unchecked
        return Check(*of, math.nan, tolerance, False, f"{type(failure).__name__}: {failure}"[:500])
    error = 0.0
    for mine, theirs in zip(got, want, strict=True):
        error = max(error, _difference(mine.cpu().double(), theirs.cpu().double()))
    close = all(
        torch.allclose(mine.cpu().double(), theirs.cpu().double(), atol=tolerance, rtol=tolerance)
        for mine, theirs in zip(got, want, strict=True)
    )
    return Check(*of, error, tolerance, close)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest one; infinite where it is not a number."""
    apart = torch.where(a == b, 0.0, (a - b).abs())  # infinities may be equal
    return float(apart.nan_to_num(math.inf).max()) if apart.numel() else 0.0


def _decode(case: Case, backend: str) -> Tensors:
    torch.manual_seed(1)
    kv = dense_pages(case.lengths(3), case.dim, case.dtype, case.device)
    q = case.normal(3, case.q_heads, case.dim)
    return decode(q, kv, scale=case.scale, backend=backend)


def _decode_windowed(case: Case, backend: str) -> Tensors:
    torch.manual_seed(1)
    kv = dense_pages(case.lengths(2), case.dim, case.dtype, case.device)
    q = case.normal(2, case.q_heads, case.dim)
    return decode(
        q,
        kv,
        scale=case.scale,
        positions=torch.full((2,), case.most, device=case.device),
        window=case.most // 2,
        softcap=3.0,
        sinks=torch.randn(case.q_heads, device=case.device),
        backend=backend,
    )


def _decode_listed(case: Case, backend: str) -> Tensors:
    torch.manual_seed(1)
    kv = dense_pages(case.lengths(2), case.dim, case.dtype, case.device)
    indices = torch.arange(0, case.most, 3, dtype=torch.int32, device=case.device)
    counts = -(-kv.lengths // 3)
    listed = TokenList(indices.expand(2, KV_HEADS, -1).contiguous(), counts)
    q = case.normal(2, case.q_heads, case.dim)
    return decode(q, kv, scale=case.scale, tokens=listed, backend=backend)


def _decode_encoded(codec: KIVI | ThinK) -> Callable[[Case, str], Tensors]:
    def run(case: Case, backend: str) -> Tensors:
        torch.manual_seed(1)
        counts = [[length // 64 for length in row] for row in case.lengths(2)]
        kv = encoded_pages(codec, counts, case.dim, case.dtype, case.device)
        q = case.normal(2, case.q_heads, case.dim)
        encoding = codec.encoding()
        assert encoding is not None
        return decode_encoded(q, kv, encoding, scale=case.scale / 4, backend=backend)

    return run


def _prefill(past: bool, pattern: bool) -> Callable[[Case, str], Tensors]:
    def run(case: Case, backend: str) -> Tensors:
        torch.manual_seed(1)
        before = case.most // 2 if past else 0
        kv = None
        if past:
            kv = dense_pages([[before] * KV_HEADS], case.dim, case.dtype, case.device)
        q = case.normal(case.chunk, case.q_heads, case.dim)
        k, v = (case.normal(case.chunk, KV_HEADS, case.dim) for _ in "kv")
        sparse = None
        if pattern:
            blocks = case.q_heads, -(-case.chunk // 64), -(-(before + case.chunk) // 64)
            mask = torch.rand(blocks, device=case.device) < 0.3
            column = torch.arange(0, before + case.chunk, 7, device=case.device)
            window = torch.full((case.q_heads,), 40, dtype=torch.int32, device=case.device)
            sparse = SparsePattern.from_blocks(mask, [column] * case.q_heads, window=window)
        return prefill(
            q,
            k,
            v,
            kv,
            scale=case.scale,
            positions=torch.arange(before, before + case.chunk, device=case.device),
            pattern=sparse,
            backend=backend,
        )

    return run


def _observed(case: Case) -> dict:
    """Queries of a chunk, the pages that it ends, and options."""
    torch.manual_seed(1)
    kv = dense_pages([[case.most, case.most // 2]], case.dim, case.dtype, case.device)
    n = min(case.chunk, case.most)
    return {
        "q": case.normal(n, case.q_heads, case.dim),
        "kv": kv,
        "scale": case.scale,
        "positions": torch.arange(case.most - n, case.most, device=case.device),
    }


def _window_weights(case: Case, backend: str) -> Tensors:
    return (observe.window_weights(**_observed(case), backend=backend),)


def _column_sums(case: Case, backend: str) -> Tensors:
    how = _observed(case)
    lse = torch.full(how["q"].shape[:2], math.log(case.most), device=case.device)
    return (observe.column_sums(**how, lse=lse, backend=backend),)


def _decode_weights(case: Case, backend: str) -> Tensors:
    torch.manual_seed(1)
    kv = dense_pages(case.lengths(2), case.dim, case.dtype, case.device)
    q = case.normal(2, case.q_heads, case.dim)
    lse = torch.full((2, case.q_heads), math.log(case.most), device=case.device)
    weights = observe.decode_weights(q, kv, lse, scale=case.scale, backend=backend)
    return weights, observe.token_weights(q, kv, scale=case.scale, backend=backend)


def _top_pages(case: Case, backend: str) -> Tensors:
    """Bounds are whole numbers, so that both backends see the same ones and the same ties."""
    torch.manual_seed(1)
    bounds = [Field(name, case.dtype, case.dim, 1) for name in ("least", "most")]
    kv = dense_pages(case.lengths(2), case.dim, case.dtype, case.device, columns=bounds)
    ids = kv.tables.unique().long()
    for name in ("least", "most"):
        view = kv.format.view(kv.data, name)
        view[ids] = view[ids].round()
    q = case.normal(2, case.q_heads, case.dim).round()
    count = max(1, case.most // 200)
    return (observe.top_pages(q, kv, count, low="least", high="most", backend=backend),)


def _append(case: Case, backend: str) -> Tensors:
    torch.manual_seed(1)
    counts = [1, case.chunk, 0, 3]
    lengths = [[case.most // 3 + 5 * row] * KV_HEADS for row in range(len(counts))]
    after = [[length + n for length in row] for row, n in zip(lengths, counts, strict=True)]
    kv = dense_pages(after, case.dim, case.dtype, case.device)
    starts = torch.tensor([0, *counts], device=case.device).cumsum(0)
    k, v = (case.normal(KV_HEADS, sum(counts), case.dim).transpose(0, 1) for _ in "kv")
    at = torch.arange(sum(counts), dtype=torch.int32, device=case.device)
    before = torch.tensor(lengths, dtype=torch.int32, device=case.device)
    append(kv.data, kv.format, kv.tables, before, starts, k, v, at, backend=backend)
    return (kv.data,)


def _compaction(case: Case, backend: str) -> Tensors:
    """The cache's moves have one implementation, by index operations: where the pages lie for
    "triton", and on the CPU for "reference"."""
    generator = torch.Generator().manual_seed(1)
    device = case.device if backend == "triton" else "cpu"
    layout = CacheLayout((LayerShape(KV_HEADS, case.dim, case.dim),), 64, case.dtype)
    cache = PagedCache(
        layout, 8 * layout.bytes_for(case.most) + (8 << 20), device, swap_bytes=64 << 20
    )
    sequence = cache.new_sequence()
    sequence.reserve(case.most)
    k, v = (
        torch.randn(case.most, KV_HEADS, case.dim, generator=generator).to(device, case.dtype)
        for _ in "kv"
    )
    at = torch.arange(case.most, dtype=torch.int32, device=device)
    BatchView(cache, [sequence], [case.most], at).append(0, k, v)
    sequence.advance(case.most)
    twin = sequence.fork()  # whose pages must stay as they are
    every = np.arange(case.most, dtype=np.int32)
    sequence.keep(0, [every[::3], every[5::2]])
    sequence.take_out(0, np.array([4, 0]))
    twin.swap_out()
    twin.swap_in()
    return (*sequence.keys_values(0), *twin.keys_values(0), sequence.positions_of(0))


def _transfers(case: Case, backend: str) -> Tensors:
    """Pages swapped out and in, and brought from host memory, beside products of matrices: through
    little memory, so that it is used again and again."""
    generator = torch.Generator().manual_seed(1)
    device = torch.device(case.device if backend == "triton" else "cpu")
    layout = CacheLayout((LayerShape(KV_HEADS, case.dim, case.dim),), 64, case.dtype)
    room = 8 * layout.bytes_for(case.most) + (8 << 20)
    beside = None
    if backend == "triton":
        beside = Transfers(device, 2 * layout.block_bytes(room))
    cache = PagedCache(layout, room, device, 64 << 20, 64 << 20, beside)
    square = torch.ones(1024, 1024, device=device)
    keys = torch.randn(case.most, KV_HEADS, case.dim, generator=generator)
    keys = keys.to(device, case.dtype)
    at = torch.arange(case.most, dtype=torch.int32, device=device)
    sequences = []
    for n in range(4):  # of which each overwrites what the one before it gave up
        sequence = cache.new_sequence()
        sequence.reserve(case.most)
        BatchView(cache, [sequence], [case.most], at).append(0, keys + n, -keys)
        sequence.advance(case.most)
        sequence.swap_out()
        square @ square
        sequences.append(sequence)
    for sequence in sequences:
        sequence.swap_in(beside=True)
        square @ square
    cache.arrive()
    swapped = [x.contiguous() for sequence in sequences for x in sequence.keys_values(0)]
    sequence = cache.new_sequence()
    sequence.add_store("host", {0: layout.formats[0]}, "host")
    fields = {"k": keys.transpose(0, 1), "v": -keys.transpose(0, 1)}
    position = at.expand(KV_HEADS, -1)[..., None]
    sequence.put("host", (0,), case.most, fields | {"position": position})
    store = sequence.stores["host"]
    ids, pool = store.laid_out(0)[0], store.pool(store.rows(0))
    if beside is None:
        return (*swapped, *[store.staged(0, device).data] * 4)
    coming, brought = beside.ahead(pool, ids), []
    for _ in range(4):
        arrive, coming = coming, beside.ahead(pool, ids)
        square @ square
        brought.append(arrive().clone())
    return (*swapped, *brought)


KERNELS: dict[str, Callable[[Case, str], Tensors]] = {
    "decode": _decode,
    "prefill": _prefill(past=False, pattern=False),
    "prefill, past": _prefill(past=True, pattern=False),
    "append": _append,
    "decode, window, cap and sinks": _decode_windowed,
    "decode, token list": _decode_listed,
    "decode, kivi 4": _decode_encoded(KIVI(bits=4)),
    "decode, kivi 2": _decode_encoded(KIVI(bits=2)),
    "decode, kivi 3": _decode_encoded(KIVI(bits=3)),
    "decode, gear 4": _decode_encoded(GEAR()),
    "decode, think": _decode_encoded(ThinK()),
    "prefill, pattern": _prefill(past=True, pattern=True),
    "window_weights": _window_weights,
    "column_sums": _column_sums,
    "decode_weights, token_weights": _decode_weights,
    "top_pages": _top_pages,
    "compaction": _compaction,
    "transfers": _transfers,
}

EVERYWHERE = ("decode", "prefill")
"""Kernels that are checked on every combination of dtype, head dimension and group; the others on
a few that have each of them once."""

EXACT = ("append", "top_pages", "compaction", "transfers")

IN_FP32 = (
    *(name for name in KERNELS if name.startswith("decode, ") and name[-1].isdigit()),
    "decode, think",
    "window_weights",
    "decode_weights, token_weights",
)
"""Results that no rounding to 16 bits has part in."""


def plan(most: int, chunk: int, device: str, *, tiny: bool) -> Iterator[tuple[str, Case]]:
    """What is checked, the most important first."""
    few = [
        (torch.bfloat16, 128, 4),
        (torch.float16, 64, 8),
        (torch.float32, 128, 1),
    ]
    every = [(dtype, dim, group) for dtype in TOLERANCE for dim in (64, 128) for group in (1, 4, 8)]
    if tiny:
        few = every = [(torch.bfloat16, 64, 4)]
    for kernel in KERNELS:
        for dtype, dim, group in every if kernel in EVERYWHERE else few:
            yield kernel, Case(dtype, dim, group, most, chunk, device)
