"""What `tamis train METHOD` has found out about a model's heads, and choosing heads by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.base import Heads
from tamis.methods.views import ModelShape


def load_scores(
    method: Heads, path: str, shape: ModelShape, names: Sequence[str]
) -> tuple[Tensor, ...]:
    """The scores of all KV heads that were fitted for `method`, fp32 [layers, kv_heads] each.

    Args:
        method: whose; it gives the file its name.
        path: the file; if empty, `<model directory>/tamis/<method>.safetensors`.
        shape: of the model that runs.
        names: the scores in the file.

    Raises:
        PlanError: the file is not there, not readable, or of another model.
    """
    name = method.method_name()
    if path:
        file = Path(path)
    elif shape.directory is not None:
        file = shape.directory / "tamis" / f"{name}.safetensors"
    else:
        raise PlanError(
            f"{name} must be fitted, and this model has no directory to look in; give "
            f"{name}(path='FILE.safetensors') that `tamis train {name} --model DIR` wrote"
        )
    if not file.is_file():
        raise PlanError(
            f"{name} has not been fitted for this model: there is no {file}; "
            f"run `tamis train {name} --model {shape.directory or 'DIR'}`"
        )
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise PlanError(f"{name} cannot read {file}: {error}") from error
    expected = (shape.n_layers, max(layer.kv_heads for layer in shape.layers))
    for one in names:
        if one not in found or tuple(found[one].shape) != expected:
            got = list(found[one].shape) if one in found else "nothing"
            raise PlanError(
                f"{name} needs {one} {list(expected)} in {file} and finds {got}: it was fitted for "
                f"another model; run `tamis train {name} --model {shape.directory or 'DIR'}`"
            )
    return tuple(found[one].float() for one in names)


def choosable(shape: ModelShape) -> Tensor:
    """Which heads there are to choose from, bool [layers, kv_heads]: those of layers without a
    sliding window, which bounds the others' memory already."""
    chosen = torch.zeros(
        shape.n_layers, max(layer.kv_heads for layer in shape.layers), dtype=torch.bool
    )
    for index, layer in enumerate(shape.layers):
        chosen[index, : layer.kv_heads] = layer.window is None
    return chosen


def top_heads(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` heads of highest score, the earlier of equals; bool [layers, kv_heads].

    Args:
        scores: [layers, kv_heads]; among: which heads take part, bool [layers, kv_heads].
    """
    order = scores.masked_fill(~among, -torch.inf).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros_like(among).flatten()
    chosen[order[:count]] = True
    return chosen.view_as(among) & among
