"""`tamis info`: what a model needs, and what the machine offers."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamis.cli import options, terminal

if TYPE_CHECKING:
    from tamis.cli.machine import Machine, Rates
    from tamis.llm import LLM

Rows = list[tuple[str, str]]


def info(
    model: options.OptionalModel = None,
    dtype: options.Dtype = "auto",
    weights: options.Weights = None,
    kv_memory: options.KVMemory = "4GiB",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Measure memory bandwidth and matmul rates too (about a second)."
        ),
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Describe a model (its layers and what its KV cache takes) and this machine.

    Without --model, it is the model that ships with tamis, or only the machine without that.
    """
    from tamis.cli.machine import measure_rates, this_machine

    report: dict[str, Any] = {}
    text: dict[str, Rows] = {}
    if model is not None:
        from tamis.llm import LLM

        terminal.quiet_logs(debug)
        llm = LLM(model, dtype=dtype, weights=weights, kv_memory=kv_memory)
        report["model"] = describe_model(llm)
        report["kv"] = describe_kv(llm)
        text["model"] = _model_rows(report["model"])
        text["KV cache"] = _kv_rows(report["kv"])
    machine = this_machine()
    report["machine"] = asdict(machine)
    text["machine"] = _machine_rows(machine)
    if measure:
        rates = measure_rates()
        report["measured"] = asdict(rates)
        text["measured"] = _rate_rows(rates)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print(text)


def describe_model(llm: LLM) -> dict[str, Any]:
    """The model's own numbers; layers of the same shape are one entry with their `count`.

    `context` and a layer's `window` are tokens, None for no limit.
    """
    from tamis.model.model import UNLIMITED

    model = llm.model
    layers = Counter(model.layers)
    return {
        "name": model.name,
        "architecture": model.architecture,
        "parameters": model.n_parameters,
        "weight_bytes": model.weight_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantized": model.weights,
        "device": str(model.device),
        "vocabulary": model.vocab_size,
        "context": None if model.max_length == UNLIMITED else model.max_length,
        "chat_template": llm.has_chat_template,
        "layers": [{"count": count, **asdict(spec)} for spec, count in layers.items()],
    }


def describe_kv(llm: LLM) -> dict[str, Any]:
    """Bytes that exact attention caches, and how long a request fits into the KV memory.

    `bytes_per_token` are keys and values alone; `page_bytes_per_token` counts the positions that
    pages also hold. `longest_request` and the context's bytes count whole pages.
    """
    from tamis.model.model import UNLIMITED

    model, layout, capacity = llm.model, llm.engine.layout, llm.engine.cache.capacity_bytes
    lengths = range(model.max_length + 1)
    limited = model.max_length < UNLIMITED
    return {
        "bytes_per_token": model.kv_bytes_per_token,
        "page_bytes_per_token": layout.bytes_per_token,
        "context_bytes": layout.bytes_for(model.max_length) if limited else None,
        "page_size": layout.page_size,
        "kv_memory": capacity,
        "longest_request": bisect_right(lengths, capacity, key=layout.bytes_for) - 1,
    }


def _model_rows(model: dict[str, Any]) -> Rows:
    from tamis.platform import format_bytes

    weights = f"{format_bytes(model['weight_bytes'])} in {model['dtype']}"
    if model["quantized"] is not None:
        weights += f", linear layers in {model['quantized']}"
    context = "no stated limit" if model["context"] is None else f"{model['context']:,} tokens"
    return [
        ("name", model["name"]),
        ("architecture", model["architecture"]),
        ("parameters", f"{model['parameters']:,}"),
        ("weights", weights),
        ("device", model["device"]),
        ("vocabulary", f"{model['vocabulary']:,} tokens"),
        ("context", context),
        ("chat template", "yes" if model["chat_template"] else "no"),
        *(("layers", _layer_text(layer)) for layer in model["layers"]),
    ]


def _layer_text(layer: dict[str, Any]) -> str:
    dims = f"{layer['k_dim']}"
    if layer["v_dim"] != layer["k_dim"]:
        dims = f"{layer['k_dim']} (values {layer['v_dim']})"
    parts = [
        f"{layer['count']} of {layer['q_heads']} heads on {layer['kv_heads']} KV heads of {dims}",
        f"window {layer['window']:,}" if layer["window"] else "full attention",
    ]
    if layer["softcap"]:
        parts.append(f"soft-cap {layer['softcap']:g}")
    if layer["sinks"]:
        parts.append("attention sinks")
    return ", ".join(parts)


def _kv_rows(kv: dict[str, Any]) -> Rows:
    from tamis.platform import format_bytes

    rows = [
        ("keys and values", f"{format_bytes(kv['bytes_per_token'])} per token"),
        ("with positions", f"{format_bytes(round(kv['page_bytes_per_token']))} per token"),
    ]
    if kv["context_bytes"] is not None:
        rows.append(("full context", format_bytes(kv["context_bytes"])))
    fits = f"one request of up to {kv['longest_request']:,} tokens"
    rows.append((f"{format_bytes(kv['kv_memory'])} hold", fits))
    return rows


def _machine_rows(machine: Machine) -> Rows:
    from tamis.platform import format_bytes

    available, total = format_bytes(machine.memory_available), format_bytes(machine.memory)
    active = [name if runs else f"{name} (missing)" for name, runs in machine.backends.items()]
    return [
        ("processor", f"{machine.cpu}, {machine.cores} cores"),
        ("instructions", ", ".join(machine.instruction_sets) or "no vector extension kernels use"),
        ("memory", f"{available} available of {total}"),
        ("GPU", ", ".join(machine.gpus) or "none"),
        ("torch", f"{machine.torch}, {machine.threads} threads"),
        ("auto dtype", machine.auto_dtype),
        ("attention", ", ".join(active)),
    ]


def _rate_rows(rates: Rates) -> Rows:
    return [
        ("memory read", f"{rates.read_bytes_per_s / 1e9:.1f} GB/s"),
        ("matmul fp32", f"{rates.matmul_fp32_flops / 1e9:,.0f} GFLOP/s"),
        ("matmul bf16", f"{rates.matmul_bf16_flops / 1e9:,.0f} GFLOP/s"),
    ]


def _print(sections: dict[str, Rows]) -> None:
    """Print sections of labelled lines, the labels in one column."""
    width = max(len(label) for rows in sections.values() for label, _ in rows)
    for title, rows in sections.items():
        typer.secho(title, bold=True)
        for label, value in rows:
            typer.echo(f"  {label:<{width}}  {value}")
