"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():  # Triton asks when it is first imported, and others import it
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import PreTrainedModel

from tamis import shipped
from tamis.platform import native_module
from tests import tiny_models


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tensors are tiny here: more threads only wait for each other, most of all on a busy machine.

    Tests of threading set their own number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """The compiled kernels; without them the tests of the native backend are skipped."""
    module = native_module(warn=False)
    if module is None:
        pytest.skip("the extension is not built")
    return module


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_dir(name)` is a directory with that tiny model and a tokenizer, written once.

    Tests that change files copy it first.
    """
    return cache(lambda name: tiny_models.save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """`tiny_model(name)` is Transformers' own model, fp32, eager attention, built once."""
    return cache(tiny_models.build)


@pytest.fixture
def nothing_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a copy of tamis that came without the reference model."""
    monkeypatch.setattr(shipped, "PLACES", ())


@pytest.fixture
def ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], Path]:
    """`ships(directory)` makes that model the one that ships, in the folder that is returned."""

    def place(directory: Path) -> Path:
        folder = tmp_path / "models" / shipped.REFERENCE
        folder.parent.mkdir()
        folder.symlink_to(directory, target_is_directory=True)
        monkeypatch.setattr(shipped, "PLACES", (tmp_path / "elsewhere", folder.parent))
        return folder

    return place
