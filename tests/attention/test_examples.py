"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

OBSERVED = [f".observe_{part}" for part in ("blocks", "chunk", "decode")]


@pytest.mark.parametrize("name", ["", ".decode", ".prefill", ".merge", *OBSERVED])
def test_examples_hold(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"tamis.attention{name}"))
    assert tried > 0
    assert failed == 0
