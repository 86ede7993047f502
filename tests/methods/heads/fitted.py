"""Model shapes, and files as `tamis train METHOD` leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tamis.methods.views import LayerShape, ModelShape


def shape_of(
    directory: Path | None, kv_heads: Sequence[int] = (4, 4, 4), windows: Sequence[int] = ()
) -> ModelShape:
    """A model with these KV heads per layer; the layers in `windows` have a sliding window."""
    layers = tuple(
        LayerShape(2 * heads, heads, 8, 8, window=16 if index in windows else None)
        for index, heads in enumerate(kv_heads)
    )
    return ModelShape(layers, vocab_size=16, dtype=torch.float32, directory=directory)


def write(directory: Path, method: str, **scores: Tensor) -> Path:
    """Write scores where the method looks for them; returns the file."""
    (directory / "tamis").mkdir(exist_ok=True)
    file = directory / "tamis" / f"{method}.safetensors"
    save_file(scores, file)
    return file
