"""Speed of paged decode: against the memory's read bandwidth and against torch's SDPA.

    python benchmarks/decode_kernel.py [--seconds 0.3] [--threads N]

Each row is one decode step of one layer over `context` cached tokens. `GB/s` counts the bytes of
keys and values, once; `of read` is the ratio to the bandwidth of a plain sum over as many bytes,
measured right before (small contexts are read from cache). `SDPA` is torch's
scaled_dot_product_attention over the same keys and values, contiguous. Times are the best of many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tamis.attention import decode
from tamis.cache.format import PagedKV, PageFormat
from tamis.platform import cpu_features

PAGE_SIZE = 64


def paged(k: torch.Tensor, v: torch.Tensor) -> PagedKV:
    """The tokens k, v [kv_heads, context, dim] of one sequence, on pages in random order."""
    kv_heads, context, dim = k.shape
    format = PageFormat.dense(PAGE_SIZE, dim, dim, k.dtype)
    per_head = format.pages_for(context)
    data = torch.zeros(kv_heads * per_head * format.page_bytes, dtype=torch.uint8)
    pages = torch.randperm(kv_heads * per_head).view(kv_heads, per_head)
    tables = pages * (format.page_bytes // 64)
    for name, tokens in (("k", k), ("v", v)):
        format.view(data, name)[tables] = tokens.view(kv_heads, per_head, PAGE_SIZE, dim)
    lengths = torch.full((1, kv_heads), context, dtype=torch.int32)
    return PagedKV(data, format, tables[None].int(), lengths)


def best_time(run: Callable[[], object], seconds: float) -> float:
    """The shortest time of one call, in seconds, of as many as fit into `seconds` (3 at least)."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(
    head_dim: int, group: int, dtype: torch.dtype, context: int, seconds: float
) -> tuple[int, float, float, float]:
    """Bytes of keys and values, and the times in seconds of reading them, of decode, of SDPA."""
    kv_heads = 2
    k, v = (torch.randn(kv_heads, context, head_dim).to(dtype) for _ in "kv")
    q = torch.randn(1, kv_heads * group, head_dim).to(dtype)
    kv = paged(k, v)
    n_bytes = 2 * k.numel() * k.element_size()
    words = torch.ones(n_bytes // 8, dtype=torch.int64)
    scale = head_dim**-0.5
    read = best_time(words.sum, seconds)
    ours = best_time(lambda: decode(q, kv, scale=scale, backend="native"), seconds)
    dense = (q[0, :, None][None], k[None], v[None])
    sdpa = best_time(lambda: F.scaled_dot_product_attention(*dense, enable_gqa=True), seconds)
    return n_bytes, read, ours, sdpa


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{cpu_features().model}, {arguments.threads} threads, 2 KV heads\n")
    print("head  GQA  dtype     context  decode ms   GB/s  of read   SDPA ms  SDPA/decode")
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 128):
            for group in (4, 1):
                for context in (2048, 8192, 32768):
                    n_bytes, read, ours, sdpa = measure(
                        head_dim, group, dtype, context, arguments.seconds
                    )
                    print(
                        f"{head_dim:4}  {group:3}  {str(dtype)[6:]:8}  {context:7}  "
                        f"{ours * 1e3:9.3f}  {n_bytes / ours / 1e9:5.1f}  {read / ours:7.2f}  "
                        f"{sdpa * 1e3:8.3f}  {sdpa / ours:11.1f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
