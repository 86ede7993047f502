"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests import tiny_models
from transformers import PreTrainedModel


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
