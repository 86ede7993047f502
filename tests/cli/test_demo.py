"""`tamis demo` measures both engines on the same prompts and checks their tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from tamis import LLM
from tamis.cli import workload
from tamis.cli.peer import TransformersPeer
from tests.cli.conftest import error_of

Tamis = Callable[..., Result]


def test_it_needs_no_model_and_says_that_the_text_is_noise(tamis: Tamis) -> None:
    result = tamis("demo", "--tokens", 512)

    assert result.exit_code == 0, result.output
    assert "random weights" in result.stdout
    assert "its text is noise" in result.stdout
    assert "identical: 32/32 tokens" in result.stdout
    for row in ("prefill of 512 tokens", "decode after it", "8 requests", "KV cache"):
        assert row in result.stdout


def test_it_runs_the_users_model_on_the_users_text(
    tamis: Tamis, endless: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.txt"
    file.write_text("def sieve(tokens): return [token for token in tokens if token]\n" * 100)

    result = tamis("demo", "--model", endless, "--document", file, "--tokens", 512)

    assert result.exit_code == 0, result.output
    assert "random weights" not in result.stdout
    assert "identical: 32/32 tokens" in result.stdout


def test_prompts_are_cut_from_the_text(endless: Path) -> None:
    llm = LLM(endless, kv_memory="16MiB")
    text = "for token in prompt: yield token\n" * 200

    work = workload.prepare(llm, text, 520)

    assert work.long == llm.encode(text)[:520]
    assert [len(prompt) for prompt in work.concurrent] == [65] * 8
    assert [token for prompt in work.concurrent for token in prompt] == work.long


def test_the_peer_generates_so_many_tokens_and_reports_its_cache(endless: Path) -> None:
    generation = TransformersPeer(endless, torch.float32).generate(range(20), 5)

    assert len(generation.token_ids) == 5
    assert generation.ttft_s > 0
    assert generation.tpot_s > 0
    # 6 layers, 2 KV heads, 64 elements of a key and of a value, 4 bytes; the last is not cached
    assert generation.kv_bytes == 24 * 6 * 2 * (64 + 64) * 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--tokens", "10"), "--tokens is 10; the least is 512"),
        (("--tokens", "10000000"), "fewer than 10,000,000; give a longer one, or --tokens"),
        (("--tokens", "32768"), "room for 32,736 prompt tokens, not 32,768; give --tokens 32736"),
        (("--document", "no/such/file"), "cannot read no/such/file"),
    ],
)
def test_prompts_that_cannot_be_made_are_explained(
    tamis: Tamis, endless: Path, options: tuple[str, ...], sentence: str
) -> None:
    assert sentence in error_of(tamis("demo", "--model", endless, *options))
