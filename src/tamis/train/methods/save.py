"""Fitted tensors on their way to `<model directory>/tamis/<method>.safetensors`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor


def save(
    tensors: Mapping[str, Tensor], folder: Path, method: str, setting: Mapping[str, object]
) -> Path:
    """Write `<folder>/<method>.safetensors`, whole or not at all; returns it.

    `folder` is made if it is not there. `setting` is what the tensors were fitted with; it goes
    into the file's metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{method}.safetensors"
    partial = path.with_suffix(".partial")
    metadata = {name: str(value) for name, value in setting.items()}
    plain = {name: one.contiguous().cpu() for name, one in tensors.items()}
    partial.write_bytes(to_bytes(plain, metadata))  # `save_file` would hide it from other users
    os.replace(partial, path)
    return path


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """One row per layer, [layers, most heads]; layers with fewer heads are padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
