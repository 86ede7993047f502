"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


def save(state: dict[str, Any], folder: Path, mirror: Path | None = None) -> None:
    """Write `state` to `folder`, replacing the last one only when the new one is complete.

    `mirror` is a second folder that gets the same file.
    """
    partial = folder / (NAME + ".partial")
    torch.save(state, partial)
    os.replace(partial, folder / NAME)
    if mirror is not None:
        mirror.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / NAME, mirror / (NAME + ".partial"))
        os.replace(mirror / (NAME + ".partial"), mirror / NAME)


def load(folder: Path, device: str = "cpu") -> dict[str, Any] | None:
    """The last complete state in `folder`, or None."""
    path = folder / NAME
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
