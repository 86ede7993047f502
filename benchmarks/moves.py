"""What the cache moves beside attention: against plain copies, against torch and numpy, and as a
share of a prefill.

    python benchmarks/moves.py [--context 32768] [--rounds 9] [--threads N] [--no-prefill]

The first table takes a whole cache of 8 layers with 2 KV heads in bf16 through each operation, a
layer or a piece of one at a time as the engine does. `MiB` are those that must be read and written;
`of copy` is their rate as a share of a plain copy's between two tensors that exceed the caches.
`reference` is the same call with TAMIS_BACKEND=reference: torch and numpy. Times are medians of
interleaved runs. `most similar` is bound by products, not by bytes: of one layer's head each token
that goes is compared with the fifth that stays, as D2O does. The second table is where a prefill of
the Llama of random weights (random_llama.py) under some plans spends its time, as a profiler of
Python's functions sees it.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from contestants_tamis import Tamis
from random_llama import LlamaShape
from tamis.attention.nearest import nearest
from tamis.cache import CacheLayout, LayerShape, PagedCache, SequenceCache
from tamis.cache.compaction import plan_compaction
from tamis.methods.codec.kivi import KIVI
from tamis.model.shift import RotaryCall, Rotation
from tamis.platform import cpu_features
from timing import in_turns

LAYERS, KV_HEADS, PAGE = 8, 2, 64
PIECE_PAGES = 32
"""Pages of each head that the engine encodes at once."""
PIECE_TOKENS = 4096
"""Tokens that the cache copies from one sequence to another at once."""
KEPT = 0.1
PLANS: dict[str, tuple[str, ...]] = {
    "snapkv(budget=0.1)": ("move_tokens", "keep", "act"),
    "kivi(bits=4)": ("gather", "encode", "scatter", "act"),
    "kivi(bits=2)": ("gather", "encode", "scatter", "act"),
    "d2o(budget=0.2)": ("move_tokens", "nearest", "_averaged", "write", "act"),
    "kvmerger()": ("move_tokens", "_pivots", "_averaged", "write", "act"),
}
"""Plans, and the functions of theirs that are looked for: `act` is all that is done between steps,
and contains the others."""


@dataclass(frozen=True)
class Case:
    """One operation on the whole cache, and the bytes that it reads and writes at least."""

    run: Callable[[], object]
    n_bytes: int


def filled(context: int, dim: int) -> tuple[PagedCache, SequenceCache, SequenceCache]:
    """A cache with two sequences of `context` random tokens."""
    layout = CacheLayout((LayerShape(KV_HEADS, dim, dim),) * LAYERS, PAGE, torch.bfloat16)
    cache = PagedCache(layout, 2 * layout.bytes_for(context) + (64 << 20))
    first, second = SequenceCache(cache), SequenceCache(cache)
    for sequence in (first, second):
        sequence.reserve(context)
        sequence.advance(context)
        for layer in range(LAYERS):
            token = [np.arange(context)] * KV_HEADS
            k, v = (torch.randn(KV_HEADS, context, dim) for _ in range(2))
            sequence.write(layer, token, list(k), list(v))
    return cache, first, second


def cases(context: int, dim: int) -> dict[str, Case]:
    """The operations by name."""
    cache, sequence, other = filled(context, dim)
    pool, tokens = cache.pools[0], LAYERS * KV_HEADS * context
    elements = tokens * dim
    row = 2 * 2 * dim + 4  # keys, values and the position of a token
    compactions = [moves_of(sequence, layer) for layer in range(LAYERS)]
    moved = sum(source[0].size for source, _ in compactions)
    ids, others = (s.held_pages()[0] for s in (sequence, other))

    def compact() -> None:
        for source, target in compactions:
            pool.move_tokens(source, target)

    def gather() -> None:
        for layer in range(LAYERS):
            sequence.keys_values(layer)

    found = {
        f"compaction to {KEPT:.0%}": Case(compact, 2 * moved * row),
        "copies of whole pages": Case(
            lambda: pool.copy_from(pool, ids, others), 2 * ids.size * pool.page_bytes
        ),
        "gather of keys and values": Case(gather, 2 * 2 * elements * 2),
    }
    k, v = sequence.keys_values(0)
    pieces = [x.view(KV_HEADS, -1, PAGE, dim).split(PIECE_PAGES, 1) for x in (k, v)]
    pages = [(k.contiguous(), v.contiguous()) for k, v in zip(*pieces, strict=True)]
    for bits in (4, 2):
        codec = KIVI(bits=bits)
        columns = codec.columns(PAGE, dim, dim, torch.bfloat16)
        written = sum(c.width * (c.rows or PAGE) * c.dtype.itemsize for c in columns) // PAGE
        run = partial(encode, codec, pages)
        found[f"KIVI in {bits} bits"] = Case(run, tokens * (2 * 2 * dim + written))
    found["keys turned, one delta"] = Case(
        partial(turn, k, torch.full((context,), 1000)), 2 * elements * 2
    )
    found["keys turned, own deltas"] = Case(
        partial(turn, k, torch.arange(context) // 3), 2 * elements * 2
    )
    kept, gone = k[0, : context // 5].contiguous(), k[0, context // 5 :].contiguous()
    found["most similar, of one head"] = Case(
        partial(nearest, gone, kept), k[0].numel() * 2 + 12 * len(gone)
    )
    return found


def moves_of(
    sequence: SequenceCache, layer: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Where the kept tokens of a layer lie, and where they go: page ids and rows."""
    rows = sequence.layout.rows(layer)
    lengths = sequence.lengths[rows]
    generator = np.random.default_rng(layer)
    kept = [np.sort(generator.choice(n, int(KEPT * n), replace=False)) for n in lengths]
    plan = plan_compaction(lengths, kept, PAGE)
    table = sequence.tables[rows]
    source, target = (
        (table[plan.head, token // PAGE], token % PAGE) for token in (plan.source, plan.target)
    )
    return source, target


def encode(codec: KIVI, pages: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Encode the pages of as many layers as there are, some at a time."""
    for k, v in pages * LAYERS:
        codec.encode(k, v, None)  # type: ignore[arg-type]  # which a codec like this never asks


def turn(k: torch.Tensor, delta: torch.Tensor) -> None:
    """Turn the keys of as many layers as there are, some at a time."""
    dim = k.shape[2]
    config = LlamaConfig(head_dim=dim, hidden_size=8 * dim, num_attention_heads=8)
    rotary = RotaryCall(LlamaRotaryEmbedding(config), {"x": torch.zeros(1)})
    rotation = Rotation(rotary, slice(0, dim // 2), False)
    for _ in range(LAYERS):
        for piece, by in zip(k.split(PIECE_TOKENS, 1), delta.split(PIECE_TOKENS), strict=True):
            rotation.shift(piece, by)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the context, operations run by torch and numpy where `name` is "reference"."""
    before = os.environ.pop("TAMIS_BACKEND", None)
    if name == "reference":
        os.environ["TAMIS_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("TAMIS_BACKEND", None)
        if before is not None:
            os.environ["TAMIS_BACKEND"] = before


def seconds(run: Callable[[], object], how: str) -> float:
    """Seconds that `run` takes by a backend."""
    with backend(how):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


@torch.inference_mode()
def operations(context: int, rounds: int) -> None:
    """Print the table of operations."""
    memory, target = torch.ones(1 << 28, dtype=torch.uint8), torch.zeros(1 << 28, dtype=torch.uint8)
    print(
        "head  operation                  MiB      ms  spread   GB/s  of copy  reference ms  ratio"
    )
    for dim in (64, 128):
        for name, case in cases(context, dim).items():
            turns = {
                "native": partial(seconds, case.run, "native"),
                "reference": partial(seconds, case.run, "reference"),
                "copy": partial(seconds, lambda: target.copy_(memory), "native"),
            }
            times = {name: taken[1:] for name, taken in in_turns(turns, rounds + 1).items()}
            low, middle, high = statistics.quantiles(times["native"], n=4)
            slow, copy = (statistics.median(times[which]) for which in ("reference", "copy"))
            rate, plain = case.n_bytes / middle, 2 * memory.nbytes / copy
            print(
                f"{dim:4}  {name:25}  {case.n_bytes / 2**20:5.0f}  {middle * 1e3:6.2f}  "
                f"{(high - low) * 1e3:6.2f}  {rate / 1e9:5.1f}  {rate / plain:7.2f}  "
                f"{slow * 1e3:12.2f}  {slow / middle:5.1f}",
                flush=True,
            )


def shares(context: int) -> None:
    """Print what the operations take of a prefill."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, LlamaShape().vocab, (context,), generator=generator).tolist()
    print("\nplan                 prefill s  share of it")
    with tempfile.TemporaryDirectory() as folder:
        LlamaShape().save(Path(folder))
        for plan, names in PLANS.items():
            engine = Tamis(Path(folder), plan)
            profiler = cProfile.Profile()
            took = profiler.runcall(engine.prefill, prompt)
            spent = dict.fromkeys(names, 0.0)
            for (file, _, name), (_, _, _, total, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
                if name in spent and f"tamis{os.sep}" in file:
                    spent[name] = max(spent[name], total)  # a function and what only hands on
            parts = ", ".join(f"{name} {t / took:.2%}" for name, t in spent.items())
            print(f"{plan:19}  {took:9.1f}  {parts}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=9, help="samples of each time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-prefill", action="store_true", help="only the first table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{cpu_features().model}, {arguments.threads} threads, {arguments.context} tokens\n")
    operations(arguments.context, arguments.rounds)
    if not arguments.no_prefill:
        shares(arguments.context)


if __name__ == "__main__":
    main()
