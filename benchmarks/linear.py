"""Linear layers of a few rows: against reading their weights, against torch, and in a decode step.

    python benchmarks/linear.py [--rounds 15] [--threads N] [--dtype bf16]

The first table takes many weights of each size in turn, more than the caches hold, as a decode step
does; `read` is a plain sum over as many bytes. The second is a token of the Llama of random weights
(random_llama.py) after 1,000 tokens of prompt, with the kernel and with torch in its layers. All
are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from contestants import Tamis
from random_llama import LlamaShape
from tamis.model import linear as layers
from tamis.model.linear import linear
from tamis.platform import DTYPES, cpu_features, native_module
from timing import Spread, in_turns

SIZES = ((128, 512), (512, 512), (1408, 512), (512, 1408), (4096, 512), (2048, 2048))
ROWS = (1, 4, 16, 32, 64, 128, 256)
BYTES = 48 << 20
"""Of all weights that a run reads."""
PROMPT, TOKENS = 1000, 20


def per_weight(multiply: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """Seconds that `multiply` takes for one of the weights, each taken once."""
    start = time.perf_counter()
    for weight in weights:
        multiply(weight)
    return (time.perf_counter() - start) / len(weights)


@torch.inference_mode()
def kernels(dtype: torch.dtype, rounds: int) -> None:
    """Print the table of single layers."""
    extension = native_module()
    assert extension is not None, "the extension is not built"
    print("weight       rows  linear us   GB/s  of read  torch us  torch/linear")
    for out, width in SIZES:
        n_bytes = out * width * dtype.itemsize
        weights = [torch.randn(out, width).to(dtype) for _ in range(max(2, BYTES // n_bytes))]
        for rows in ROWS:
            x = torch.randn(rows, width).to(dtype)
            runs: dict[str, Callable[[torch.Tensor], object]] = {
                "ours": partial(linear, extension, x),
                "torch": partial(F.linear, x),
                "read": lambda weight: weight.view(-1).view(torch.int64).sum(),
            }
            turns = {name: partial(per_weight, run, weights) for name, run in runs.items()}
            times = {n: Spread.of(t[1:]).median for n, t in in_turns(turns, rounds + 1).items()}
            print(
                f"{out:4} x {width:4}  {rows:4}  {times['ours'] * 1e6:9.1f}  "
                f"{n_bytes / times['ours'] / 1e9:5.1f}  {times['read'] / times['ours']:7.2f}  "
                f"{times['torch'] * 1e6:8.1f}  {times['torch'] / times['ours']:12.1f}",
                flush=True,
            )


def decode_step(rounds: int) -> None:
    """Print the time of a token with either implementation of the layers."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaShape().save(Path(folder))
        engine = Tamis(Path(folder))
    engine.prefill(range(3, 3 + PROMPT))

    def decode(most: int, few: int) -> float:
        layers.MAX_ROWS, layers.FEW_ROWS = most, few  # with 0 every layer takes torch's way
        return engine.decode(TOKENS)

    turns = {
        "kernel": partial(decode, layers.MAX_ROWS, layers.FEW_ROWS),
        "torch": partial(decode, 0, 0),
    }
    print("\nlayers by  ms per token at 1k (least, greatest)")
    for name, times in in_turns(turns, rounds + 1).items():
        spread = Spread.of([1e3 * seconds for seconds in times[1:]])
        print(f"{name:9}  {spread.median:.2f} ({spread.low:.2f}, {spread.high:.2f})")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="samples of each time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{cpu_features().model}, {arguments.threads} threads, {arguments.dtype}\n")
    kernels(DTYPES[arguments.dtype], arguments.rounds)
    decode_step(arguments.rounds)


if __name__ == "__main__":
    main()
