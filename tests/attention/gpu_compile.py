"""Compiles the Triton kernels for a GPU that need not be there, and prints what they take of it.

    python -m tests.attention.gpu_compile CAPABILITY DTYPE DIM

A line of JSON per kernel: its name, and the bytes of shared memory of a program. This is a process
of its own because Triton decides once whether kernels are interpreted.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tamis.attention.encoding import Encoding, PageEncoding, Plain, Pruned, Quantized
from tamis.attention.gpu import decode, encoded, observe, prefill
from tamis.attention.pattern import SparsePattern, TokenList
from tamis.cache import gpu as moves
from tamis.cache.format import Field, PagedKV, PageFormat
from tests.attention import naive
from tests.attention.encoded_pages import page_format, pages

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def compiling(capability: int) -> Callable[..., None]:
    """What is called in place of a launch: it compiles the kernel as that launch would."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bound = inspect.signature(kernel.fn).bind(*args, **options).arguments
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        for parameter in kernel.params:
            name, value = parameter.name, bound[parameter.name]
            if parameter.is_constexpr:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind.startswith("*")
        }
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
        )
        shared = compiled.metadata.shared
        print(json.dumps({"kernel": kernel.fn.__name__, "shared": shared}), flush=True)

    return run


def launch_all(dtype: torch.dtype, dim: int) -> None:
    """Call every kernel's function once for each of its variants."""
    kv = naive.cached([[70, 5]], page_size=16, k_dim=dim, v_dim=dim, dtype=dtype).kv
    q, at, lse = torch.randn(1, 8, dim).to(dtype), torch.tensor([70]), torch.zeros(1, 8)
    sinks = torch.zeros(8)
    decode.decode(q, kv, scale=1.0)
    decode.decode(q, kv, scale=1.0, positions=at, window=9, softcap=2.0, sinks=sinks)
    listed = TokenList(torch.zeros(1, 2, 1, dtype=torch.int32), torch.ones(1, 2).int())
    decode.decode(q, kv, scale=1.0, tokens=listed)

    chunk, k = torch.randn(20, 8, dim).to(dtype), torch.randn(20, 2, dim).to(dtype)
    after = {"scale": 1.0, "positions": torch.arange(70, 90)}
    pattern = SparsePattern.from_blocks(torch.ones(8, 1, 2, dtype=torch.bool))
    prefill.prefill(chunk, k, k, kv, **after)
    prefill.prefill(chunk, k, k, kv, **after, window=9, softcap=2.0, sinks=sinks)
    prefill.prefill(chunk, k, k, kv, **after, pattern=pattern)

    seen = {**after, "window": None, "softcap": None}
    observe.chunk_scores(chunk, kv, 70, **seen)
    observe.column_sums(chunk, kv, torch.zeros(20, 8), 70, **seen)
    observe.decode_scores(q, kv, 70, scale=1.0, softcap=None)
    observe.decode_weights(q, kv, lse, 70, scale=1.0, positions=at, window=9, softcap=None)
    bounds = (Field("low", dtype, dim, 1), Field("high", dtype, dim, 1))
    format = PageFormat.dense(16, dim, dim, dtype).extended(bounds)
    data = torch.zeros(format.page_bytes, dtype=torch.uint8)
    bounded = PagedKV(data, format, torch.zeros(1, 2, 1).int(), torch.ones(1, 2).int())
    observe.top_pages(q, bounded, 1, low="low", high="high", before=None)

    starts, positions = torch.tensor([0, 20]), torch.arange(20, dtype=torch.int32)
    moves.append(kv.data, kv.format, kv.tables, kv.lengths, starts, k, k, positions)

    for encoding in (
        PageEncoding(Encoding(Quantized(2, 32, "tokens")), Encoding(Quantized(2, 32, "channels"))),
        PageEncoding(
            Encoding(Quantized(3, 32, "tokens"), True, True),
            Encoding(Quantized(3, 32, "channels"), True, True),
        ),
        PageEncoding(Encoding(Quantized(4, 8, "tokens")), Encoding(Quantized(4, 8, "tokens"))),
        PageEncoding(Encoding(Pruned()), Encoding(Plain())),
    ):
        coded = pages(encoding, page_format(encoding, 64, dim, dim, dtype), dim, dim, [[1, 1]])
        encoded.decode(q, coded, encoding, scale=1.0, softcap=2.0)


if __name__ == "__main__":
    JITFunction.run = compiling(int(sys.argv[1]))
    launch_all(getattr(torch, sys.argv[2]), int(sys.argv[3]))
