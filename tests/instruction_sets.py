"""What the compiled kernels can be run with here."""

from __future__ import annotations

from tamis.platform import native_module


def isas() -> list[str]:
    """Names of the instruction sets; none where the extension is not built."""
    module = native_module(warn=False)
    return module.isas() if module is not None else []
