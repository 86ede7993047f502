"""A token's step as a whole: against reading what it must read, and against torch's modules.

    python benchmarks/decode_step.py [--shape 0.5B] [--contexts 1024 8192] [--rounds 7]

Llamas of random weights in bf16 (random_llama.py): the default of 27 M parameters, and one of
Qwen2.5-0.5B's shape. `limit` is the time of reading every weight and every cached key and value
once, at the rate of a plain sum over 512 MB. *layers* is the engine as it is, *modules* runs
Transformers' modules with the kernels of linear layers and norms in them. Medians of interleaved
runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from contestants_tamis import Tamis
from random_llama import LlamaShape
from tamis.platform import cpu_features
from timing import Spread, in_turns

SHAPES = {
    "27M": LlamaShape(),
    "0.5B": LlamaShape(hidden=896, intermediate=4864, layers=24, q_heads=14, vocab=32_000),
}
TOKENS = 10


def seconds_of(run: Callable[[], object]) -> float:
    """Wall clock of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def with_modules(engine: Tamis) -> float:
    """Seconds per token while every decoder layer runs its own forward."""
    layers = engine.llm.engine.model.decoder_layers
    quick = [layer.__dict__.pop("forward", None) for layer in layers]
    try:
        return engine.decode(TOKENS)
    finally:
        for layer, forward in zip(layers, quick, strict=True):
            if forward is not None:
                layer.forward = forward


def steps(name: str, contexts: list[int], rounds: int) -> None:
    """Print the table's rows of one shape."""
    shape = SHAPES[name]
    memory = torch.ones(1 << 26, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder:
        shape.save(Path(folder))
        engine = Tamis(Path(folder))
    for context in contexts:
        engine.prefill([3 + i % (shape.vocab - 3) for i in range(context)])
        turns = {
            "layers": partial(engine.decode, TOKENS),
            "modules": partial(with_modules, engine),
            "read": partial(seconds_of, memory.sum),
        }
        times = {n: Spread.of(t[1:]) for n, t in in_turns(turns, rounds + 1).items()}
        rate = memory.nbytes / times["read"].median
        limit = shape.decode_bytes(context) / rate
        ours, modules = times["layers"], times["modules"]
        print(
            f"{name:5}  {context:7,}  {1e3 * ours.median:9.2f} "
            f"({1e3 * ours.low:.2f}, {1e3 * ours.high:.2f})  {1e3 * modules.median:10.2f}  "
            f"{rate / 1e9:9.0f}  {1e3 * limit:8.2f}  {ours.median / limit:12.2f}",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], nargs="+", default=[*SHAPES])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{cpu_features().model}, {arguments.threads} threads, bf16\n")
    print("shape  context  layers ms (least, greatest)  modules ms  read GB/s  limit ms  ratio")
    for name in arguments.shape:
        steps(name, arguments.contexts, arguments.rounds)


if __name__ == "__main__":
    main()
