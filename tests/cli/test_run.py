"""`tamis run` prints what the API generates, says what it cost, and explains its errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import Result

from tamis import LLM, SamplingParams
from tamis.cli.run import measurement
from tamis.engine.outputs import RequestMetrics
from tests.cli.conftest import error_of

Tamis = Callable[..., Result]
SETTINGS = ("--dtype", "fp32", "--kv-memory", "16MiB")
PROMPT = "The sieve keeps what matters."


@pytest.fixture(scope="module")
def llm(endless: Path) -> LLM:
    return LLM(endless, dtype="fp32", kv_memory="16MiB")


def run(tamis: Tamis, model: Path, *options: object, **keywords: str | bytes) -> Result:
    return tamis("run", "--model", model, *SETTINGS, *options, **keywords)


def test_stdout_is_the_text_that_the_api_generates(tamis: Tamis, llm: LLM, endless: Path) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=24))

    result = run(tamis, endless, "--prompt", PROMPT, "--max-tokens", 24)

    assert result.exit_code == 0
    assert result.stdout == expected.text + "\n"


def test_the_prompt_is_wrapped_in_the_models_chat_template(tamis: Tamis, llama: Path) -> None:
    llm = LLM(llama, dtype="fp32", kv_memory="16MiB")
    tokens = llm.encode_chat([{"role": "user", "content": PROMPT}])
    (expected,) = llm.generate(tokens, SamplingParams(max_tokens=24))

    by_default = run(tamis, llama, "--prompt", PROMPT, "--max-tokens", 24)
    asked_for = run(tamis, llama, "--chat", "--prompt", PROMPT, "--max-tokens", 24)
    without = run(tamis, llama, "--no-chat", "--prompt", PROMPT, "--max-tokens", 24)

    assert by_default.stdout == asked_for.stdout == expected.text + "\n"
    assert without.stdout != by_default.stdout


def test_the_question_follows_the_text_wherever_that_comes_from(
    tamis: Tamis, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Ein Sieb für Token.", encoding="utf-8")
    content = file.read_bytes()
    options = ("--question", "What is kept?", "--max-tokens", 12)

    joined = run(
        tamis, llama, "--prompt", "Ein Sieb für Token.\n\nWhat is kept?", "--max-tokens", 12
    )
    from_file = run(tamis, llama, "--prompt-file", file, *options)
    from_stdin = run(tamis, llama, "--prompt-file", "-", *options, input=content)
    from_prompt_stdin = run(tamis, llama, "--prompt", "-", *options, input=content)

    assert joined.exit_code == 0
    assert joined.stdout.strip()
    assert from_file.stdout == from_stdin.stdout == from_prompt_stdin.stdout == joined.stdout


def test_sampling_options_reach_the_engine(tamis: Tamis, llm: LLM, endless: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.5, top_p=0.95, top_k=50, seed=7)
    (expected,) = llm.generate(PROMPT, params)
    (greedy,) = llm.generate(PROMPT, SamplingParams(max_tokens=24))
    sampling = ("--temperature", 1.5, "--top-p", 0.95, "--top-k", 50, "--seed", 7)

    result = run(tamis, endless, "--prompt", PROMPT, "--max-tokens", 24, *sampling)

    assert result.stdout == expected.text + "\n"
    assert expected.text != greedy.text


def test_generation_ends_at_a_stop_text(tamis: Tamis, llm: LLM, endless: Path) -> None:
    (whole,) = llm.generate(PROMPT, SamplingParams(max_tokens=24))
    stop = whole.text[10:12]
    options = ("--prompt", PROMPT, "--max-tokens", 24, "--stop", "never", "--json")

    result = run(tamis, endless, *options, "--stop", stop)

    answer = json.loads(result.stdout)
    assert answer["text"] == whole.text[: whole.text.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert answer["stop_reason"] == stop


def test_one_line_on_stderr_says_what_it_cost(tamis: Tamis, llm: LLM, endless: Path) -> None:
    result = run(tamis, endless, "--prompt", PROMPT, "--max-tokens", 8)

    line = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"{len(llm.encode(PROMPT))} prompt tokens · first token after \S+ s \([\d,]+ tokens/s\) · "
        r"8 generated at \S+ ms/token \([\d,.]+ tokens/s\) · "
        r"KV \S+ [KM]iB at its peak, \S+ [KM]iB dense",
        line,
    )


def test_the_measurement_leaves_out_what_was_not_measured() -> None:
    metrics = RequestMetrics(
        prompt_tokens=1200,
        output_tokens=1,
        queue_s=0.0,
        ttft_s=0.5,
        tpot_s=None,
        total_s=0.5,
        kv_bytes=0,
        kv_bytes_peak=3 * 2**20,
        kv_bytes_dense=2**20,
        preemptions=0,
    )

    assert measurement(metrics) == (
        "1,200 prompt tokens · first token after 0.5 s (2,400 tokens/s) · 1 generated · "
        "KV 3 MiB at its peak, 1 MiB dense"
    )


def test_json_is_one_object_with_tokens_and_metrics(tamis: Tamis, llm: LLM, endless: Path) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=8))

    result = run(tamis, endless, "--prompt", PROMPT, "--max-tokens", 8, "--json")

    answer = json.loads(result.stdout)
    assert set(answer) == {
        "prompt_tokens",
        "text",
        "token_ids",
        "finish_reason",
        "stop_reason",
        "metrics",
    }
    assert answer["prompt_tokens"] == len(llm.encode(PROMPT))
    assert answer["text"] == expected.text
    assert answer["token_ids"] == expected.token_ids
    assert answer["finish_reason"] == "length"
    assert set(answer["metrics"]) == {field.name for field in fields(RequestMetrics)}
    assert answer["metrics"]["kv_bytes_peak"] == expected.metrics.kv_bytes_peak


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--prompt", "x" * 600, "--no-chat"), "601 tokens, but the model's context is 512"),
        (("--prompt", "x", "--kv-memory", "1KiB"), "kv_memory of 1 KiB"),
        (("--prompt", "x", "--kv-memory", "lots"), "malformed memory size 'lots'"),
        (("--prompt", "x", "--dtype", "int3"), "unknown dtype 'int3'"),
        (("--prompt", "x", "--plan", "snapkv("), "'snapkv(' is not a plan"),
        (("--prompt", "x", "--plan", "magic"), "unknown method 'magic'"),
        (("--prompt", "x", "--top-p", "7"), "top_p is 7"),
        (("--prompt", "x", "--max-batch-tokens", "0"), "max_batch_tokens"),
        (("--prompt-file", "no/such/file"), "cannot read no/such/file: No such file"),
        (("--prompt", "x", "--prompt-file", "y"), "--prompt and --prompt-file were both given"),
        ((), "no prompt; give --prompt-file FILE"),
    ],
)
def test_what_cannot_be_run_is_explained_in_one_line(
    tamis: Tamis, llama: Path, options: tuple[str, ...], sentence: str
) -> None:
    assert sentence in error_of(run(tamis, llama, *options))


def test_a_file_that_is_not_text_is_refused(tamis: Tamis, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.bin"
    file.write_bytes(b"text\xff\xfe")

    assert "is not UTF-8 text (byte 4)" in error_of(run(tamis, llama, "--prompt-file", file))


def test_a_missing_model_is_named(tamis: Tamis, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"

    assert str(missing) in error_of(run(tamis, missing, "--prompt", "x"))


def test_a_request_that_fails_on_the_way_says_why(
    tamis: Tamis, endless: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(endless, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})

    assert "logits are not finite" in error_of(run(tamis, broken, "--prompt", "x"))


def test_kv_memory_that_is_too_small_says_how_much_would_do(tamis: Tamis, llama: Path) -> None:
    options = ("--no-chat", "--prompt", "x" * 400, "--max-tokens", "100")

    sentence = error_of(run(tamis, llama, *options, "--kv-memory", "100KiB"))
    enough = re.search(r"kv_memory=(\d+) would do", sentence)

    assert enough is not None
    assert run(tamis, llama, *options, "--kv-memory", enough[1]).exit_code == 0
