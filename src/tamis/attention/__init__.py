"""Attention over pages: pure functions, each exact and each returning its log-sum-exp.

`observe` holds the statistics of it that methods ask for.
"""

from tamis.attention import observe
from tamis.attention.decode import decode
from tamis.attention.merge import merge_states
from tamis.attention.prefill import prefill
from tamis.platform import BACKENDS, native_module

__all__ = ["backends", "decode", "merge_states", "observe", "prefill"]


def backends() -> dict[str, bool]:
    """Every backend by name, and whether it can run on this machine.

    Example:
        >>> from tamis.attention import backends
        >>> backends()["reference"]
        True
    """
    missing = native_module(warn=False) is None
    return {name: name != "native" or not missing for name in BACKENDS}
