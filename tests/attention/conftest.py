"""Fixtures of the attention tests."""

from __future__ import annotations

from types import ModuleType

import pytest

from tamis.platform import native_module


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """The compiled kernels; without them the tests of the native backend are skipped."""
    module = native_module(warn=False)
    if module is None:
        pytest.skip("the extension is not built")
    return module
