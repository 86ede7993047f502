"""Speed of chunked prefill: against the processor's matmul rate and against torch's SDPA.

    python benchmarks/prefill_kernel.py [--seconds 0.5] [--threads N]

Each row is the attention of one layer for a chunk of `tokens` after `past` cached tokens. FLOPs are
those of the visible pairs only; `of matmul` is the ratio to the rate of a 1024 x 1024 torch matmul
in the same dtype, measured first. `SDPA` is torch's scaled_dot_product_attention over the same
tokens in contiguous memory, with heads repeated and an explicit mask where there is a past.
Times are the best of many.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from decode_kernel import best_time, paged
from tamis.attention import prefill
from tamis.platform import cpu_features

Q_HEADS, KV_HEADS = 8, 2


def matmul_rate(dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of a large matmul."""
    a = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / best_time(lambda: a @ a, seconds)


def measure(
    head_dim: int, dtype: torch.dtype, tokens: int, past: int, seconds: float
) -> tuple[int, float, float]:
    """FLOPs, and the times in seconds of prefill and of SDPA."""
    q = torch.randn(tokens, Q_HEADS, head_dim).to(dtype)
    k, v = (torch.randn(KV_HEADS, past + tokens, head_dim).to(dtype) for _ in "kv")
    cached = paged(k[:, :past], v[:, :past]) if past else None
    own_k, own_v = (x[:, past:].transpose(0, 1) for x in (k, v))
    scale, positions = head_dim**-0.5, torch.arange(past, past + tokens)
    ours = best_time(
        lambda: prefill(
            q, own_k, own_v, cached, scale=scale, positions=positions, backend="native"
        ),
        seconds,
    )
    repeated = [x.repeat_interleave(Q_HEADS // KV_HEADS, 0)[None] for x in (k, v)]
    mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past) if past else None
    dense = q.transpose(0, 1)[None]
    sdpa = best_time(
        lambda: F.scaled_dot_product_attention(
            dense, *repeated, attn_mask=mask, is_causal=not past
        ),
        seconds,
    )
    pairs = tokens * past + tokens * (tokens + 1) // 2
    return 4 * Q_HEADS * head_dim * pairs, ours, sdpa


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
    print("head  dtype     tokens   past  prefill ms  TFLOP/s  of matmul   SDPA ms  SDPA/prefill")
    for dtype in (torch.bfloat16, torch.float32):
        peak = matmul_rate(dtype, arguments.seconds)
        for head_dim in (64, 128):
            for tokens, past in ((2048, 0), (512, 8192), (64, 8192)):
                flops, ours, sdpa = measure(head_dim, dtype, tokens, past, arguments.seconds)
                print(
                    f"{head_dim:4}  {str(dtype)[6:]:8}  {tokens:6}  {past:5}  {ours * 1e3:10.2f}  "
                    f"{flops / ours / 1e12:7.3f}  {flops / ours / peak:9.2f}  {sdpa * 1e3:8.2f}  "
                    f"{sdpa / ours:12.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
