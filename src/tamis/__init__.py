"""tamis: a long-context LLM inference engine whose KV cache is programmable, from birth to reuse.

from tamis import LLM, SamplingParams

llm = LLM("path/to/model")
outputs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=64))
outputs[0].text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tamis.async_llm import AsyncLLM as AsyncLLM
    from tamis.inspection import Inspection as Inspection
    from tamis.llm import LLM as LLM
    from tamis.plan import Plan as Plan
    from tamis.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "Inspection", "Plan", "SamplingParams", "__version__"]

_HOME = {
    "LLM": "tamis.llm",
    "AsyncLLM": "tamis.async_llm",
    "Inspection": "tamis.inspection",
    "Plan": "tamis.plan",
    "SamplingParams": "tamis.sampling",
}


def __getattr__(name: str) -> object:
    """Import torch and transformers only when something that needs them is asked for."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
