"""Speed of sparse prefill and of decode over listed tokens, against dense attention.

    python benchmarks/sparse_kernels.py [--seconds 0.5] [--threads N]

Prefill: one layer's attention for a prompt, in one chunk. Every query block sees its own key block;
besides, *random* lists a share of the key blocks, different ones for every query head; *shared*
the same ones for all; *slashes* lists diagonals of blocks, and columns, different for every head;
*A-shape* sees 64 sinks and a window. `ratio` is the time over that of dense attention, measured
beside it; with a kernel that only computes what it must it would be the density.

Decode: one step of one layer that reads every 16th cached token of each head, or as many that
follow on each other. Times are the best of many.
"""

from __future__ import annotations

import argparse

import torch

from decode_kernel import best_time, paged
from tamis.attention import decode, prefill
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.platform import cpu_features

Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK = 8, 2, 64, 64


def random_blocks(tokens: int, share: float, *, shared: bool = False) -> SparsePattern:
    """A share of the key blocks at random, and the diagonal."""
    blocks = tokens // BLOCK
    mask = torch.rand(1 if shared else Q_HEADS, blocks, blocks) < share
    mask = (mask | torch.eye(blocks, dtype=torch.bool)).tril()
    return SparsePattern.from_blocks(mask.expand(Q_HEADS, -1, -1))


def some_offsets(count: int, below: int) -> torch.Tensor:
    """Zero, and `count` random numbers in 1..below."""
    return torch.cat([torch.zeros(1).long(), torch.randperm(below - 1)[:count] + 1])


def slashes(tokens: int, share: float) -> SparsePattern:
    """Half of the share in diagonals of blocks, half in columns."""
    blocks, n_slashes = tokens // BLOCK, int(tokens / BLOCK * share / 2)
    offset = torch.arange(blocks)[:, None] - torch.arange(blocks)
    mask = torch.stack(
        [torch.isin(offset, some_offsets(n_slashes, blocks)) for _ in range(Q_HEADS)]
    )
    columns = [torch.randperm(tokens)[: int(tokens * share / 2)] for _ in range(Q_HEADS)]
    return SparsePattern.from_blocks(mask, columns)


def compare_prefill(dtype: torch.dtype, tokens: int, seconds: float) -> None:
    """Print a row for each pattern."""
    q, k, v = (
        torch.randn(tokens, heads, HEAD_DIM).to(dtype) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    )
    lengths = torch.zeros(KV_HEADS, dtype=torch.int64)
    patterns = {
        "random 10 %": random_blocks(tokens, 0.1),
        "random 3 %": random_blocks(tokens, 0.03),
        "shared 10 %": random_blocks(tokens, 0.1, shared=True),
        "slashes 10 %": slashes(tokens, 0.1),
        "A-shape 1024": SparsePattern.a_shape(Q_HEADS, tokens, lengths, 64, 1024),
        "all blocks": random_blocks(tokens, 2.0),
    }

    def run(pattern: SparsePattern | None) -> float:
        options = {"scale": HEAD_DIM**-0.5, "positions": torch.arange(tokens)}
        return best_time(
            lambda: prefill(q, k, v, None, pattern=pattern, backend="native", **options), seconds
        )

    for name, pattern in patterns.items():
        dense, sparse = run(None), run(pattern)
        print(
            f"{str(dtype)[6:]:8}  {tokens:6}  {name:12}  {pattern.density(lengths):7.3f}  "
            f"{dense * 1e3:8.1f}  {sparse * 1e3:9.1f}  {sparse / dense:5.3f}",
            flush=True,
        )


def compare_decode(dtype: torch.dtype, context: int, seconds: float) -> None:
    """Print a row for each list."""
    kv = paged(*(torch.randn(KV_HEADS, context, HEAD_DIM).to(dtype) for _ in "kv"))
    q, read = torch.randn(1, Q_HEADS, HEAD_DIM).to(dtype), context // 16
    counts = torch.full((1, KV_HEADS), read, dtype=torch.int32)
    lists = {"every 16th": torch.arange(read) * 16, "last 16th": torch.arange(context)[-read:]}

    def run(tokens: TokenList | None) -> float:
        return best_time(
            lambda: decode(q, kv, scale=HEAD_DIM**-0.5, tokens=tokens, backend="native"), seconds
        )

    for name, indices in lists.items():
        tokens = TokenList(indices.int().expand(1, KV_HEADS, -1), counts)
        dense, listed = run(None), run(tokens)
        print(
            f"{str(dtype)[6:]:8}  {context:7}  {name:10}  {dense * 1e3:8.3f}  "
            f"{listed * 1e3:9.3f}  {listed / dense:5.3f}",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"{cpu_features().model}, {arguments.threads} threads, {Q_HEADS} query heads, "
        f"{KV_HEADS} KV heads of {HEAD_DIM}\n"
    )
    print("dtype     tokens  pattern       density  dense ms  sparse ms  ratio")
    for dtype in (torch.bfloat16, torch.float32):
        compare_prefill(dtype, 16384, arguments.seconds)
    print("\ndtype     context  list        dense ms  listed ms  ratio")
    for dtype in (torch.bfloat16, torch.float32):
        for context in (32768, 131072):
            compare_decode(dtype, context, arguments.seconds)


if __name__ == "__main__":
    main()
