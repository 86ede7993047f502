"""The same with other numbers of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def on_threads(run: Callable[[], T], *counts: int) -> list[T]:
    """What `run` returns with each of these numbers of torch's threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found
