"""Linear layers whose weights are kept in 8 or 4 bits, quantized by torchao when a model is loaded.

Weight-only: inputs and outputs stay in the model's dtype. Of int8, the compiled kernels read a few
rows' weights as they are (`tamis.model.linear`), so that decoding takes less time too; everything
else is torchao's way, which converts the whole weight for every product. int4 is torch's own kernel
for CPUs, made for a few rows: prompts take twice as long (docs/kernels.md).

int8: symmetric, one scale per output. w ~ q scale, q in [-128, 127].
int4: asymmetric, a scale and a zero per output and group of 32 inputs, in the model's dtype.
w ~ (q - 8) scale + zero, q in [0, 15].
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tamis.errors import ConfigError
from tamis.platform import NATIVE_DTYPES

WEIGHTS = ("int8", "int4")
"""What the weights of linear layers may be kept in, beside the model's dtype."""

GROUP = 32
"""Inputs that share a scale and a zero in int4."""

OUTPUTS = 16
"""torch's int4 kernels take outputs in whole numbers of so many."""


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


class Matrix(NamedTuple):
    """A weight as kernels read it.

    Attributes:
        weight: [out, in], of a dtype of `tamis.platform.NATIVE_DTYPES`; or int8, with scales.
        scales: fp32 [out], of the rows of the weight; None where it is exact.
    """

    weight: Tensor
    scales: Tensor | None

    def meets(self, dtype: torch.dtype) -> bool:
        """Whether kernels multiply it with rows of a dtype."""
        return dtype in NATIVE_DTYPES and (self.scales is not None or self.weight.dtype == dtype)


def matrix_of(weight: Tensor) -> Matrix | None:
    """What is in a linear layer's weight, exact or in int8; None where kernels cannot read it."""
    if type(weight) is nn.Parameter:
        return Matrix(weight, None)
    # torchao's Int8Tensor as `quantize_weights` makes it; others may quantize the rows too. What
    # torchao puts on it is read, for a tensor subclass's own properties cost microseconds each.
    if type(weight).__name__ != "Int8Tensor":
        return None
    int8: Any = weight
    plain = int8.act_quant_kwargs is None and int8.act_pre_scale is None
    plain = plain and int8.scale.dtype == torch.float32
    return Matrix(int8.qdata, int8.scale) if plain and len(int8.scale) == len(int8.qdata) else None


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
