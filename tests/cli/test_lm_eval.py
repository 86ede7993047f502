"""`tamis lm-eval` without the harness says how to get it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

from tests.cli.conftest import error_of


def test_without_the_harness_it_says_how_to_get_it(
    tamis: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)

    result = tamis("lm-eval", "--tasks", "hellaswag")

    assert "pip install 'tamis[eval]'" in error_of(result)
