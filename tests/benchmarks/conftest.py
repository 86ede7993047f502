"""The benchmarks are scripts: they import one another by the directory they lie in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from random_llama import LlamaShape


@pytest.fixture(scope="session")
def shape() -> LlamaShape:
    """A Llama of some thousand parameters."""
    return LlamaShape(
        hidden=64,
        intermediate=96,
        layers=2,
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=128,
        max_tokens=1024,
    )


@pytest.fixture(scope="session")
def directory(shape: LlamaShape, tmp_path_factory: pytest.TempPathFactory):
    """Where that Llama is saved."""
    path = tmp_path_factory.mktemp("llama")
    shape.save(path)
    return path
