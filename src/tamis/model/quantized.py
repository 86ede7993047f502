"""Linear layers whose weights are kept in 8 or 4 bits, quantized by torchao when a model is loaded.

Weight-only: inputs, outputs and what is added up stay in the model's dtype.

int8: symmetric, one scale per output. w ~ q scale, q in [-128, 127].
int4: asymmetric, a scale and a zero per output and group of 32 inputs, in the model's dtype.
w ~ (q - 8) scale + zero, q in [0, 15].
"""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tamis.errors import ConfigError

WEIGHTS = ("int8", "int4")
"""What the weights of linear layers may be kept in, beside the model's dtype."""

GROUP = 32
"""Inputs that share a scale and a zero in int4."""

OUTPUTS = 16
"""torch's int4 kernels take outputs in whole numbers of so many."""

FEW_ROWS = 16
"""Up to so many rows torch's int8 kernel is faster than converting the whole weight for the
product of two matrices, which is what torchao does (docs/kernels.md)."""


def check_weights(weights: str | None) -> None:
    """Raise ConfigError unless `weights` is None or one of WEIGHTS, and torchao is installed."""
    if weights is None:
        return
    if weights not in WEIGHTS:
        raise ConfigError(
            f"unknown weights {weights!r}: use one of {', '.join(WEIGHTS)}, or none for exact ones"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"weights in {weights} need torchao; pip install 'tamis[quantized]'")


def quantize_weights(network: nn.Module, weights: str, exact: nn.Module | None = None) -> None:
    """Replace the weights of a network's linear layers by quantized ones, in place.

    Layers that are no `nn.Linear` (the experts of a mixture) stay as they are, and so do in int4
    those whose inputs are no multiple of GROUP or whose outputs are none of OUTPUTS. Not
    differentiable by the weights, nor in int4 by the inputs.

    Args:
        network: on its device, in its dtype.
        weights: one of WEIGHTS.
        exact: a layer that stays as it is, such as the output projection.

    Raises:
        ConfigError: as `check_weights`; no layer can be quantized; or it is int4 on a device other
            than the CPU.
    """
    check_weights(weights)
    chosen = {
        module
        for module in network.modules()
        if type(module) is nn.Linear and module is not exact and _fits(module.weight, weights)
    }
    if not chosen:
        raise ConfigError(
            f"no linear layer of this {type(network).__name__} can be quantized to {weights}; "
            "load it with exact weights"
        )
    device = next(iter(chosen)).weight.device
    if weights == "int4" and device.type != "cpu":
        raise ConfigError(f"weights in int4 run on the CPU only, not on {device}; use int8")
    from torchao.quantization import quantize_

    with torch.no_grad():
        quantize_(network, _config(weights), filter_fn=lambda module, name: module in chosen)
    for module in chosen:
        # A method, for a deep copy of the module binds it to the copy.
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def stored_bytes(parameter: Tensor) -> int:
    """Bytes in which a parameter is kept; `Tensor.nbytes` would say those of its dtype."""
    if not is_traceable_wrapper_subclass(parameter):
        return parameter.nbytes
    names, _ = parameter.__tensor_flatten__()
    return sum(stored_bytes(getattr(parameter, name)) for name in names)


def _fits(weight: Tensor, weights: str) -> bool:
    """Whether a weight [out, in] can be quantized."""
    out, width = weight.shape
    return weights == "int8" or (width % GROUP == 0 and out % OUTPUTS == 0)


def _config(weights: str) -> Any:
    """torchao's name for it."""
    if weights == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(set_inductor_config=False)
    # torchao's own int4 formats are for GPUs; this one is for torch's kernels on the CPU.
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear.forward` of a quantized `module`, for any x [..., in]."""
    weight: Any = module.weight
    out, width = weight.shape
    few = x.is_cpu and 0 < x.numel() <= FEW_ROWS * width and x.shape[-1] == width
    if not few or torch.is_grad_enabled() or weight.dtype != x.dtype or not _is_int8(weight):
        return F.linear(x, weight, module.bias)
    rows, scales = x.reshape(-1, width), weight.scale.flatten().to(x.dtype)
    y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, weight.qdata, scales)
    y = y.view(*x.shape[:-1], out)
    return y if module.bias is None else y.add_(module.bias)


def _is_int8(weight: Any) -> bool:
    """Whether a weight is torchao's int8 with a scale per output."""
    return getattr(getattr(weight, "qdata", None), "dtype", None) is torch.int8
