"""Root mean square norms in one pass.

Transformers' norms are six operations of torch: each costs more than the arithmetic where rows are
few, and goes through memory where they are many.
"""

from __future__ import annotations

from enum import IntEnum
from types import MethodType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tamis.model.linear import SERVED
from tamis.platform import NATIVE_DTYPES, native_for, native_module


class RmsStyle(IntEnum):
    """Where a norm rounds to the dtype of its input (`RmsStyle` in native/rows.h)."""

    ROUNDED = 0
    """Before and after the multiplication by the weight, as Llama's."""
    WEIGHTED = 1
    """After it, as gpt-oss'."""
    PLUS_ONE = 2
    """After the multiplication by 1 + weight, as Gemma's."""


class RmsNorm(NamedTuple):
    """What a module computes, x / sqrt(mean(x²) + epsilon) times its weight (arXiv 1910.07467,
    equation 4), and how."""

    epsilon: float
    style: RmsStyle

    def operand(self, weight: Tensor) -> tuple[int, float, int]:
        """The norm as the compiled kernels take it."""
        return (weight.data_ptr(), self.epsilon, self.style)


def find_norm(module: nn.Module) -> RmsNorm | None:
    """The norm that `module` computes, or None.

    A module that has the shape of one, a weight and an epsilon, is asked about a few random rows,
    and its answer must be that norm's to the bit.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    shaped = len(module._parameters) == 1 and weight is not None and weight.ndim == 1
    if not shaped or not isinstance(epsilon, float) or module._modules or module._buffers:
        return None
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            answer = module(x)
        except (RuntimeError, TypeError):  # it takes something else
            return None
        for style in RmsStyle:
            norm = RmsNorm(epsilon, style)
            if isinstance(answer, Tensor) and torch.equal(answer, _reference(norm, x, weight)):
                return norm
    return None


def rms_norm(
    extension: ModuleType, norm: RmsNorm, x: Tensor, weight: Tensor, *, isa: str | None = None
) -> Tensor:
    """`norm` of the rows of x by the compiled kernel: in fp32, rounded where its style says.

    Args:
        extension: the compiled module.
        x: [..., width], on the CPU.
        weight: [width], contiguous, of the same dtype.
        isa: the instruction set, one of the extension's `isas()`; None for the best.

    Returns:
        Like x, contiguous.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    width = len(weight)
    dtype = NATIVE_DTYPES[x.dtype]
    operand = norm.operand(weight)
    rows, threads = x.numel() // width, torch.get_num_threads()
    extension.rms_norm(isa or "", threads, dtype, rows, width, x.data_ptr(), operand, y.data_ptr())
    return y


def quick_norms(network: nn.Module) -> None:
    """Give the norms of a model in fp16 or bf16 on the CPU the kernel.

    Only instances are changed, and only those that `find_norm` knows. Autograd and fp32 take
    torch's way.
    """
    for module in network.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype not in SERVED or native_for(None, weight) is None:
            continue
        norm = find_norm(module)
        if norm is not None and weight.is_contiguous():
            module.forward = MethodType(_Forward(norm), module)


class _Forward:
    """The forward of a module that computes `norm`."""

    def __init__(self, norm: RmsNorm) -> None:
        self._norm = norm

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, extension = module._parameters["weight"], native_module()
        assert weight is not None
        if extension is None or torch.is_grad_enabled() or not _alike(x, weight):
            out: Tensor = type(module).forward(module, x)
            return out
        return rms_norm(extension, self._norm, x, weight)


def _alike(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can take the two; a module may have been converted since it was given
    the kernel, and torch says best what is wrong with an input."""
    width = weight.shape[0]
    return (
        x.numel() > 0
        and x.shape[-1] == width
        and x.dtype == weight.dtype
        and x.dtype in SERVED
        and x.is_cpu
        and weight.is_cpu
    )


def _reference(norm: RmsNorm, x: Tensor, weight: Tensor) -> Tensor:
    """`norm` of x [..., width] by torch, as Transformers' modules compute it."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    if norm.style is RmsStyle.ROUNDED:
        return weight * y.to(x.dtype)
    factor = weight.float() + (1.0 if norm.style is RmsStyle.PLUS_ONE else 0.0)
    return (y * factor).to(x.dtype)
