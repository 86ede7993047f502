"""Speed of attention's statistics: against the attention whose weights they are.

    python benchmarks/observe_kernel.py [--seconds 0.5] [--threads N]

Each row is one layer: `column_sums` of a prompt against its dense `prefill`, `window_weights` of
its last 64 queries, and `decode_weights` and `partial_scores` (16 channels) of one query against
`decode`. Times are the best of many; the two of a row are measured one right after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from decode_kernel import best_time, paged
from tamis.attention import decode, observe, prefill
from tamis.cache.format import PagedKV
from tamis.platform import cpu_features

Q_HEADS, KV_HEADS = 8, 2
WINDOW, CHANNELS = 64, 16
PROMPT, CONTEXT = 8192, 32768

Pair = tuple[Callable[[], object], Callable[[], object]]


def positioned(k: torch.Tensor, v: torch.Tensor) -> PagedKV:
    """`paged`, with the positions 0, 1, 2 and so on."""
    kv = paged(k, v)
    positions = kv.format.view(kv.data, "position")
    order = torch.arange(k.shape[1], dtype=torch.int32).view(-1, kv.format.page_size, 1)
    for table in kv.tables[0].long():
        positions[table] = order
    return kv


def contests(head_dim: int, dtype: torch.dtype) -> dict[str, Pair]:
    """By name: the statistic, and the attention it is held against."""
    k, v = (torch.randn(KV_HEADS, PROMPT, head_dim).to(dtype) for _ in "kv")
    q, kv = torch.randn(PROMPT, Q_HEADS, head_dim).to(dtype), positioned(k, v)
    scale, at = head_dim**-0.5, torch.arange(PROMPT)
    own = (q, k.transpose(0, 1), v.transpose(0, 1), None)
    _, lse = prefill(*own, scale=scale, positions=at)

    def attend() -> object:
        return prefill(*own, scale=scale, positions=at)

    long = positioned(*(torch.randn(KV_HEADS, CONTEXT, head_dim).to(dtype) for _ in "kv"))
    one = q[:1]
    _, one_lse = decode(one, long, scale=scale)
    channels = torch.rand(1, KV_HEADS, head_dim).argsort(-1)[..., :CHANNELS]

    def step() -> object:
        return decode(one, long, scale=scale)

    last = {"scale": scale, "positions": at[-WINDOW:]}
    return {
        "column_sums": (
            lambda: observe.column_sums(q, kv, lse, scale=scale, positions=at),
            attend,
        ),
        "window_weights": (lambda: observe.window_weights(q[-WINDOW:], kv, **last), attend),
        "decode_weights": (
            lambda: observe.decode_weights(one, long, one_lse, scale=scale),
            step,
        ),
        "partial_scores": (
            lambda: observe.partial_scores(one, long, channels, scale=scale),
            step,
        ),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"{cpu_features().model}, {arguments.threads} threads, "
        f"{Q_HEADS} query heads, {KV_HEADS} KV heads\n"
    )
    print("head  dtype     statistic       statistic ms  attention ms  ratio")
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 128):
            for name, (statistic, attention) in contests(head_dim, dtype).items():
                ours, base = (best_time(run, arguments.seconds) for run in (statistic, attention))
                print(
                    f"{head_dim:4}  {str(dtype)[6:]:8}  {name:14}  {ours * 1e3:12.3f}  "
                    f"{base * 1e3:12.3f}  {ours / base:5.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
