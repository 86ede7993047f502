"""`tamis info` tells what a model needs and what the machine offers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from typer.testing import Result

from tamis import LLM
from tamis.attention import backends
from tests.cli.conftest import error_of

Tamis = Callable[..., Result]


def test_the_models_numbers_are_those_of_its_configuration(tamis: Tamis, llama: Path) -> None:
    result = tamis("info", "--model", llama, "--dtype", "bf16", "--kv-memory", "16MiB", "--json")

    report = json.loads(result.stdout)
    model, kv = report["model"], report["kv"]
    assert model["architecture"] == "LlamaForCausalLM"
    assert model["dtype"] == "bfloat16"
    assert model["weight_bytes"] == 2 * model["parameters"]
    assert model["context"] == 512
    assert model["chat_template"] is True
    (layers,) = model["layers"]
    assert (layers["count"], layers["q_heads"], layers["kv_heads"]) == (3, 4, 2)
    assert (layers["k_dim"], layers["v_dim"], layers["window"]) == (16, 16, None)
    # 3 layers, 2 KV heads, 16 elements of a key and of a value, 2 bytes each
    assert kv["bytes_per_token"] == 3 * 2 * (16 + 16) * 2
    # and 4 bytes of position for each head
    assert kv["page_bytes_per_token"] == kv["bytes_per_token"] + 3 * 2 * 4
    assert kv["context_bytes"] == 512 * kv["page_bytes_per_token"]


def test_layers_of_different_shapes_are_told_apart(
    tamis: Tamis, tiny_dir: Callable[[str], Path]
) -> None:
    result = tamis("info", "--model", tiny_dir("gemma3"), "--kv-memory", "16MiB")

    assert "2 of 4 heads on 2 KV heads of 16, window 16" in result.stdout
    assert "1 of 4 heads on 2 KV heads of 16, full attention" in result.stdout


def test_the_longest_request_fits_and_no_longer_one(tamis: Tamis, llama: Path) -> None:
    memory = "100KiB"
    result = tamis("info", "--model", llama, "--dtype", "fp32", "--kv-memory", memory, "--json")
    longest = json.loads(result.stdout)["kv"]["longest_request"]
    engine = LLM(llama, dtype="fp32", kv_memory=memory).engine

    assert 0 < longest < 512
    assert engine.layout.bytes_for(longest) <= engine.cache.capacity_bytes
    assert engine.layout.bytes_for(longest + 1) > engine.cache.capacity_bytes


def test_without_a_model_it_describes_the_machine(tamis: Tamis, nothing_ships: None) -> None:
    report = json.loads(tamis("info", "--json").stdout)
    text = tamis("info").stdout

    assert set(report) == {"machine"}
    machine = report["machine"]
    assert machine["backends"] == backends()
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert 0 < machine["memory_available"] <= machine["memory"]
    assert machine["cpu"] in text
    assert "reference" in text


def test_rates_are_measured_on_request(tamis: Tamis, nothing_ships: None) -> None:
    rates = json.loads(tamis("info", "--measure", "--json").stdout)["measured"]

    assert set(rates) == {"read_bytes_per_s", "matmul_fp32_flops", "matmul_bf16_flops"}
    assert all(rate > 1e7 for rate in rates.values())
    assert "GB/s" in tamis("info", "--measure").stdout


def test_a_directory_without_a_model_is_refused(tamis: Tamis, tmp_path: Path) -> None:
    assert "config.json" in error_of(tamis("info", "--model", tmp_path))


def test_quantized_weights_are_told_apart(tamis: Tamis, llama: Path) -> None:
    command = ("info", "--model", llama, "--dtype", "bf16", "--kv-memory", "1MiB")
    exact, model = (
        json.loads(tamis(*command, *more, "--json").stdout)["model"]
        for more in ((), ("--weights", "int8"))
    )

    assert (exact["quantized"], model["quantized"]) == (None, "int8")
    assert model["weight_bytes"] < exact["weight_bytes"]
    assert "bfloat16, linear layers in int8" in tamis(*command, "--weights", "int8").stdout


def test_unknown_weights_are_refused(tamis: Tamis, llama: Path) -> None:
    error = error_of(tamis("info", "--model", llama, "--weights", "int2"))
    assert error == "unknown weights 'int2': use one of int8, int4, or none for exact ones"
