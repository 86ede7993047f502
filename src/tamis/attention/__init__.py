"""Attention over pages: pure functions, each exact and each returning its log-sum-exp.

`observe` holds the statistics of it that methods ask for.
"""

import torch

from tamis.attention import observe
from tamis.attention.decode import decode
from tamis.attention.merge import merge_states
from tamis.attention.prefill import prefill
from tamis.platform import BACKENDS, native_module, triton_installed

__all__ = ["backends", "decode", "merge_states", "observe", "prefill"]


def backends() -> dict[str, bool]:
    """Every backend by name, and whether it can run on this machine.

    Example:
        >>> from tamis.attention import backends
        >>> backends()["reference"]
        True
    """
    runs = {
        "reference": True,
        "native": native_module(warn=False) is not None,
        "triton": triton_installed() and torch.cuda.is_available(),
    }
    return {name: runs[name] for name in BACKENDS}
