"""Fixtures of the engine's tests: a small model in fp32 and prompts for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tamis.model import Model, load_model


@pytest.fixture(scope="session")
def load(tiny_dir: Callable[[str], Path]) -> Callable[[str], Model]:
    """`load(name)` is the tiny model of that name as tamis loads it, in fp32, loaded once."""
    loaded: dict[str, Model] = {}

    def load_once(name: str) -> Model:
        if name not in loaded:
            loaded[name] = load_model(tiny_dir(name), dtype="float32", device="cpu")
        return loaded[name]

    return load_once


@pytest.fixture(scope="session")
def llama(load: Callable[[str], Model]) -> Model:
    return load("llama")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Random prompts shorter and longer than a page, the tiny models' window and their RoPE."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (n,), generator=generator).tolist() for n in (3, 17, 40, 1, 90, 26)
    ]
