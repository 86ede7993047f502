"""The Triton kernels on a GPU: whether they are right, and how fast they are.

    python benchmarks/gpu.py                 # under 10 minutes; writes results/gpu.json
    python benchmarks/gpu.py --device cpu    # tiny, under Triton's interpreter: whether it runs

Three parts. *Checks*: every Triton kernel against the reference backend on random shapes, in fp16,
bf16 and fp32, heads of 64 and 128, 1, 4 and 8 query heads per KV head. *Times*: each kernel beside
what the device allows (bytes over the bandwidth of a copy, operations over the rate of a large
matrix product, both measured here), torch's `scaled_dot_product_attention` and FlexAttention;
medians of interleaved runs. Calls are timed as they are made, Python included; of copies to host
memory and back, how much of them ran beside other work. *End to end*: the Llama of random weights
through `tamis.LLM` and through 🤗 Transformers: whether greedy tokens are equal in fp32, and
milliseconds of prompts and of tokens in bf16; and decode steps of 1, 8 and 32 requests with CUDA
graphs and without, whether their tokens are equal and milliseconds of a step.

It ends by itself when the time is up; Ctrl-C leaves what there is. The exit status is 1 if a
kernel is wrong or does not run, 2 if nothing can run here, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "gpu.json"


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="the JSON file; for cpu a temporary one")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    if options.device == "cpu":
        # Triton asks when it is first imported, so nothing that imports it stands at the top.
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ["TAMIS_BACKEND"] = "triton"

    import torch
    from rich.console import Console

    from gpu_run import Settings, run
    from tamis.cli.terminal import quiet_logs

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "this machine has no GPU that torch can use; --device cpu runs everything at tiny "
            "sizes under Triton's interpreter, which times nothing",
            file=sys.stderr,
        )
        return 2
    if options.device == "cuda":
        settings, path = Settings("cuda", options.minutes), options.out or RESULTS
    else:
        settings = Settings.tiny(options.minutes)
        path = options.out or Path(tempfile.gettempdir()) / "tamis-gpu-interpreted.json"
    quiet_logs(debug=False)
    try:
        record = run(settings, path, Console())
    except KeyboardInterrupt:
        return 130
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
