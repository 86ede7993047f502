"""Decode and prefill with weights of linear layers in bf16, int8 and int4, and their bytes.

    python benchmarks/quantized.py [--context 1024] [--rounds 7] [--threads N]

A Llama of random weights of Qwen2.5-0.5B's shape (decode_step.py); its output projection stays in
bf16 throughout. Medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch

from contestants_tamis import Tamis
from decode_step import SHAPES, TOKENS
from tamis.platform import cpu_features, format_bytes
from timing import Spread, in_turns

WEIGHTS = (None, "int8", "int4")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{cpu_features().model}, {arguments.threads} threads, context {arguments.context:,}\n")
    with tempfile.TemporaryDirectory() as folder:
        SHAPES["0.5B"].save(Path(folder))
        engines = {weights: Tamis(Path(folder), weights=weights) for weights in WEIGHTS}
    prompt = range(3, 3 + arguments.context)
    prefills = {weights: partial(engine.prefill, prompt) for weights, engine in engines.items()}
    decodes = {weights: partial(engine.decode, TOKENS) for weights, engine in engines.items()}
    prefilling = in_turns(prefills, arguments.rounds + 1)
    decoding = in_turns(decodes, arguments.rounds + 1)  # after the last prompts
    print("weights  bytes      decode ms/token (least, greatest)  prefill s (least, greatest)")
    for weights, engine in engines.items():
        decode = Spread.of([1e3 * seconds for seconds in decoding[weights][1:]])
        prefill = Spread.of(prefilling[weights][1:])
        print(
            f"{weights or 'bf16':7}  {format_bytes(engine.llm.model.weight_bytes):9}  "
            f"{decode.median:6.1f} ({decode.low:.1f}, {decode.high:.1f}){'':16}  "
            f"{prefill.median:5.2f} ({prefill.low:.2f}, {prefill.high:.2f})"
        )


if __name__ == "__main__":
    main()
