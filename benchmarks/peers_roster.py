"""Who takes part in the comparison, on which models, and in which parts it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from random_llama import LlamaShape

TAMIS = "tamis"
TRANSFORMERS = "Transformers"
LLAMA_CPP = "llama.cpp"
CONTINUOUS = "Transformers, continuous batching"


@dataclass(frozen=True)
class Engine:
    """An engine, or one way of using it.

    Attributes:
        kind: the class that drives it, as "module:class"; its arguments are in `options`.
        environment: of `peers_install.PEERS`; None is the one that runs the benchmark.
        threaded: whether it takes the number of threads as an argument, beside torch's.
        needs_gguf: whether it reads a GGUF file.
    """

    kind: str
    environment: str | None = None
    options: Mapping[str, str | float | bool] = field(default_factory=dict)
    threaded: bool = False
    needs_gguf: bool = False


def _tamis(plan: str) -> Engine:
    return Engine("contestants_tamis:Tamis", options={"plan": plan})


def _kvpress(press: str) -> Engine:
    options = {"press": press, "ratio": 0.9}
    return Engine("contestants_kvpress:KVPress", "kvpress", options)


def _llama_cpp(kv: str, flash: bool) -> Engine:
    options = {"kv": kv, "flash": flash}
    return Engine("contestants_llamacpp:LlamaCpp", "llama.cpp", options, True, True)


ENGINES = {
    TAMIS: _tamis("dense"),
    TRANSFORMERS: Engine("contestants_transformers:Transformers", "transformers"),
    LLAMA_CPP: _llama_cpp("f16", flash=False),
    "llama.cpp, flash attention": _llama_cpp("f16", flash=True),
    "llama.cpp, q8_0 KV": _llama_cpp("q8_0", flash=True),
    "llama.cpp, q4_0 KV": _llama_cpp("q4_0", flash=True),
    "tamis, kivi 4-bit": _tamis("kivi(bits=4)"),
    "tamis, kivi 2-bit": _tamis("kivi(bits=2)"),
    "kvpress, SnapKV": _kvpress("SnapKVPress"),
    "kvpress, StreamingLLM": _kvpress("StreamingLLMPress"),
    "kvpress, LagKV": _kvpress("LagKVPress"),
    "tamis, snapkv": _tamis("snapkv(budget=0.1)"),
    "tamis, streamingllm": _tamis("streamingllm(budget=0.1)"),
    "tamis, lagkv": _tamis("lagkv(budget=0.1)"),
    "tamis, minference + snapkv": _tamis(
        "minference(verticals=500, slashes=50) + snapkv(budget=2048)"
    ),
    CONTINUOUS: Engine("contestants_transformers:ContinuousBatching", "transformers"),
}
"""All of them, by the name that tables show."""

EXACT = (TAMIS, TRANSFORMERS, LLAMA_CPP)
DENSE = (*EXACT, "llama.cpp, flash attention")
QUANTIZED = ("llama.cpp, q8_0 KV", "llama.cpp, q4_0 KV", "tamis, kivi 4-bit", "tamis, kivi 2-bit")
DROPPING = (
    *("kvpress, SnapKV", "kvpress, StreamingLLM", "kvpress, LagKV"),
    *("tamis, snapkv", "tamis, streamingllm", "tamis, lagkv"),
)
CROWDS = (TAMIS, TRANSFORMERS, CONTINUOUS, LLAMA_CPP)
SHORTENED = ("tamis, snapkv", "tamis, minference + snapkv")

MODELS = {
    "27M": LlamaShape(max_tokens=131_072 + 1024),
    "0.5B": LlamaShape(
        hidden=896, intermediate=4864, layers=24, q_heads=14, vocab=32_000, max_tokens=33_792
    ),
}
"""The Llama of `benchmarks/engine.py`, with room for longer contexts, and one of Qwen2.5-0.5B's
shape."""
QUICK_MODEL = "quick"


@dataclass(frozen=True)
class Part:
    """What is measured together, in turns, each engine in a process of its own.

    Attributes:
        name: of the part, unique.
        model: of `MODELS`.
        engines: who takes part; of `ENGINES`.
        tokens: of each prompt.
        requests: 0 measures one request, step by step; more are answered at once.
        new_tokens: generated per sample of decoding, or after each of the requests.
        prefills, rounds: samples of prefill, and of everything else.
    """

    name: str
    model: str
    engines: tuple[str, ...]
    tokens: int
    requests: int = 0
    new_tokens: int = 32
    prefills: int = 3
    rounds: int = 3


def _series(model: str, tokens: int, label: str, engines: tuple[str, ...], **sizes: int) -> Part:
    return Part(f"{model} {tokens // 1024}k {label}", model, engines, tokens, **sizes)


def _crowd(model: str, requests: int, tokens: int, new_tokens: int, rounds: int) -> Part:
    name = f"{model} {requests} requests"
    return Part(name, model, CROWDS, tokens, requests, new_tokens, rounds=rounds)


PARTS = (
    _series("27M", 2048, "dense", DENSE),
    _series("27M", 2048, "quantized", (TAMIS, *QUANTIZED)),
    _series("27M", 8192, "dense", DENSE, prefills=2),
    _series("27M", 8192, "quantized", (TAMIS, *QUANTIZED), prefills=1),
    _series("27M", 8192, "dropping", (TAMIS, TRANSFORMERS, *DROPPING), prefills=2),
    # llama.cpp takes minutes for a prompt of 32k: one sample of it, and a part to itself.
    _series("27M", 32_768, "Transformers", EXACT[:2], prefills=2),
    _series("27M", 32_768, "llama.cpp", (TAMIS, LLAMA_CPP), prefills=1),
    _series("27M", 32_768, "flash", (TAMIS, "llama.cpp, flash attention"), prefills=1),
    # A quarter of an hour each for a prompt of llama.cpp with quantized KV: not at this length.
    _series("27M", 32_768, "quantized", (TAMIS, *QUANTIZED[2:]), prefills=1),
    _series("27M", 32_768, "dropping", (TAMIS, TRANSFORMERS, *DROPPING), prefills=1),
    _crowd("27M", 8, 2048, 128, rounds=4),
    _crowd("27M", 32, 1024, 64, rounds=1),
    _series("0.5B", 2048, "dense", DENSE, prefills=2),
    _series("0.5B", 8192, "dense", EXACT, prefills=1),
    _crowd("0.5B", 8, 512, 32, rounds=1),
    _series("27M", 65_536, "exact", EXACT[:2], prefills=1),
    _series("27M", 65_536, "plans", SHORTENED, prefills=1),
    _series("27M", 131_072, "plans", SHORTENED[1:], prefills=1),
    _series("27M", 131_072, "dense", (TAMIS,), prefills=1),
)
"""The whole comparison; each part takes some minutes."""


def quick_parts() -> tuple[Part, ...]:
    """Every engine once, at sizes that take seconds and prove nothing."""
    sizes = {"new_tokens": 8, "prefills": 1, "rounds": 2}
    steppers = tuple(name for name in ENGINES if name != CONTINUOUS)
    return (
        Part("quick series", QUICK_MODEL, steppers, 256, **sizes),
        Part("quick requests", QUICK_MODEL, CROWDS, 128, requests=4, new_tokens=16, rounds=1),
    )


def shape_of(model: str) -> LlamaShape:
    """The shape of a part's model."""
    return LlamaShape(layers=2, max_tokens=2048) if model == QUICK_MODEL else MODELS[model]
