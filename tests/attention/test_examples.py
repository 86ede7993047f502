"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["", ".decode", ".prefill", ".merge"])
def test_examples_hold(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"tamis.attention{name}"))
    assert tried > 0
    assert failed == 0
