"""Speed of decode over encoded pages, against decode over bf16 pages in the same run.

    python benchmarks/encoded_kernel.py [--layers 12] [--context 32768] [--seconds 1] [--threads N]

Each row is a decode step of `layers` layers in turn, so that their pages exceed the processor's
caches as a model's do (`--layers 1` shows what the caches allow), over `context` tokens of 2 KV
heads, pages in random order. `bytes` are those of the pages; `of read` is the rate at which they
are read, as a share of a plain sum's over memory. Times are medians of interleaved runs, per layer;
`spread` is the distance between their quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tamis.attention import decode
from tamis.attention.encoded import decode_encoded
from tamis.cache.format import Field, PagedKV, PageFormat
from tamis.methods.base import Codec
from tamis.methods.codec.gear import GEAR
from tamis.methods.codec.kivi import KIVI
from tamis.methods.codec.think import ThinK
from tamis.platform import cpu_features

PAGE_SIZE = 64
KV_HEADS = 2
CODECS: dict[str, Codec | None] = {
    "bf16": None,
    "kivi 8": KIVI(bits=8),
    "kivi 4": KIVI(bits=4),
    "kivi 3": KIVI(bits=3),
    "kivi 2": KIVI(bits=2),
    "kivi 1": KIVI(bits=1),
    "gear 4": GEAR(),
    "gear-l 4": GEAR(sparsity=0.0),
    "think": ThinK(),
}


def pages(codec: Codec | None, context: int, dim: int) -> PagedKV:
    """Random pages of one layer; what they hold does not matter to their speed, if it is finite."""
    if codec is None:
        format = PageFormat.dense(PAGE_SIZE, dim, dim, torch.bfloat16)
    else:
        columns = codec.columns(PAGE_SIZE, dim, dim, torch.bfloat16)
        fields = tuple(Field(c.name, c.dtype, c.width, c.rows) for c in columns)
        format = PageFormat(PAGE_SIZE, fields)
    per_head = context // PAGE_SIZE
    n = KV_HEADS * per_head
    data = torch.zeros(n * format.page_bytes, dtype=torch.uint8)
    ids = torch.randperm(n) * (format.page_bytes // 64)
    for field in format.fields:
        view = format.view(data, field.name)
        shape = n, *view.shape[1:]
        if field.dtype.is_floating_point:
            view[ids] = torch.rand(shape).to(field.dtype)
        elif field.name == "k_mask":
            view[ids] = (torch.arange(dim) < format.field("k_kept").width).to(torch.uint8)
        else:
            view[ids] = torch.randint(0, PAGE_SIZE * dim, shape).to(field.dtype)
    lengths = torch.full((1, KV_HEADS), context, dtype=torch.int32)
    return PagedKV(data, format, ids.view(1, KV_HEADS, per_head).int(), lengths)


def step(codec: Codec | None, layers: list[PagedKV], q: torch.Tensor) -> Callable[[], None]:
    """One decode step of all layers."""
    scale = q.shape[2] ** -0.5
    encoding = codec.encoding() if codec is not None else None

    def run() -> None:
        for kv in layers:
            if encoding is None:
                decode(q, kv, scale=scale, backend="native")
            else:
                decode_encoded(q, kv, encoding, scale=scale, backend="native")

    return run


def timed(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Times in seconds of interleaved runs, about `seconds` for each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--pages", nargs="+", default=list(CODECS), choices=list(CODECS))
    arguments = parser.parse_args()
    chosen = {name: CODECS[name] for name in ["bf16", *arguments.pages]}
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"{cpu_features().model}, {arguments.threads} threads, {arguments.layers} layers of "
        f"{arguments.context} tokens, {KV_HEADS} KV heads\n"
    )
    print("head  GQA  pages     bytes/token  ms/layer  spread   GB/s  of read  bf16 / this")
    memory = torch.ones(1 << 26, dtype=torch.int64)
    for dim in arguments.heads:
        caches = {
            name: [pages(codec, arguments.context, dim) for _ in range(arguments.layers)]
            for name, codec in chosen.items()
        }
        for group in arguments.groups:
            q = torch.randn(1, KV_HEADS * group, dim).bfloat16()
            runs: dict[str, Callable[[], object]] = {"read": memory.sum}
            runs |= {name: step(codec, caches[name], q) for name, codec in chosen.items()}
            times = timed(runs, arguments.seconds)
            read = memory.nbytes / statistics.median(times.pop("read"))
            dense = statistics.median(times["bf16"])
            for name, taken in times.items():
                low, middle, high = statistics.quantiles(taken, n=4)
                page_bytes = caches[name][0].format.page_bytes
                rate = sum(kv.data.numel() for kv in caches[name]) / middle
                per_layer = 1e3 / arguments.layers
                print(
                    f"{dim:4}  {group:3}  {name:8}  {page_bytes / PAGE_SIZE:11.1f}  "
                    f"{middle * per_layer:8.3f}  {(high - low) * per_layer:6.3f}  "
                    f"{rate / 1e9:5.1f}  {rate / read:7.2f}  {dense / middle:11.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
