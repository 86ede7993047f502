"""Fixtures: small models whose heads are fitted, engines over them, prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from tamis import LLM
from tamis.model import Model, load_model
from tests import tiny_models
from tests.methods.engine.plans import PAGE

Load = Callable[..., Model]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`load(name, dtype)` is a tiny model with random gates and scores of its heads, as
    `tamis train` would have left them beside its weights."""

    @cache
    def save(name: str) -> object:
        directory = tiny_models.save(name, tmp_path_factory.mktemp(f"fitted-{name}"))
        shapes = [spec.kv_heads for spec in load_model(directory, dtype="float32").layers]
        generator = torch.Generator().manual_seed(1)
        size = (len(shapes), max(shapes))
        (directory / "tamis").mkdir()
        for method, names in (
            ("duoattention", ["gates"]),
            ("razorattention", ["induction", "echo"]),
        ):
            scores = {one: torch.rand(size, generator=generator) for one in names}
            save_file(scores, directory / "tamis" / f"{method}.safetensors")
        return directory

    @cache
    def load_once(name: str, dtype: str = "float32") -> Model:
        return load_model(save(name), dtype=dtype, device="cpu")  # type: ignore[arg-type]

    return load_once


@pytest.fixture(scope="session")
def make(load: Load) -> Callable[..., LLM]:
    """`make(name, dtype, **settings)` is a new engine over a tiny model."""

    def make_one(name: str = "llama", dtype: str = "float32", **settings: object) -> LLM:
        wanted = {"kv_memory": "32MiB", "page_size": PAGE} | settings
        return LLM(load(name, dtype), **wanted)  # type: ignore[arg-type]

    return make_one


@pytest.fixture(scope="session")
def llms(make: Callable[..., LLM]) -> Callable[..., LLM]:
    """`llms(...)` as `make(...)`, but the same engine whenever the same is asked for."""
    return cache(make)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Random prompts of 200, 137, 100 and 61 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = (200, 137, 100, 61)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
