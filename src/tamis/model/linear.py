"""Linear layers of a few rows at the speed of memory.

A decode step multiplies every weight of the model with a handful of rows, so it takes the time of
reading the weights. torch's products are made for many rows and need two to three times that; and
still more than the kernel where a small chunk of a prompt joins the step. Weights in int8
(`tamis.model.quantized`) are half as many bytes.
"""

from __future__ import annotations

from types import MethodType, ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from tamis.model.quantized import Matrix, matrix_of
from tamis.platform import NATIVE_DTYPES, cpu_features, native_for, native_module

SERVED = (torch.float16, torch.bfloat16)
"""Dtypes that the kernels run; fp32 keeps torch, whose bits greedy decoding promises, unless its
weights are in int8, which promise nothing."""

MAX_ROWS = 256
"""Up to so many rows the kernel is no slower than torch for about any matrix where bf16 is
multiplied by AVX512-BF16 (docs/kernels.md)."""

FEW_ROWS = 16
"""The same for fp16, which is multiplied as floats, and where torch has AMX or the kernel has
nothing better than floats."""


def linear(
    extension: ModuleType,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    *,
    isa: str | None = None,
) -> torch.Tensor:
    """`x @ weight.T * scales + bias` by the compiled kernel: summed in fp32, rounded once.

    A row's result depends neither on the rows beside it nor on the number of threads, which is
    `torch.get_num_threads()`. Not differentiable.

    Args:
        extension: the compiled module.
        x: [..., in], of a dtype of `NATIVE_DTYPES`, on the CPU.
        weight: [out, in], contiguous, of the same dtype; int8 where there are scales.
        bias: [out], contiguous, of the dtype of x.
        scales: fp32 [out], contiguous.
        isa: the instruction set, one of the extension's `isas()`; None for the best.

    Returns:
        [..., out], of the same dtype.
    """
    out, width = weight.shape
    # Views cost more than a small layer's product: rows are only made where x does not lie so.
    # Named here so that a copy lives until the kernel has read it.
    rows = x if x.is_contiguous() else x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    extension.linear(
        isa or "",
        torch.get_num_threads(),
        NATIVE_DTYPES[x.dtype],
        rows.numel() // width,
        width,
        out,
        rows.data_ptr(),
        width if rows is x else rows.stride(0),
        weight.data_ptr(),
        scales.data_ptr() if scales is not None else 0,
        bias.data_ptr() if bias is not None else 0,
        y.data_ptr(),
    )
    return y


def small_batches(network: nn.Module) -> None:
    """Give every `nn.Linear` of a model on the CPU, in fp16 or bf16 or with weights in int8, the
    kernel for a few rows.

    Only instances are changed. Inputs of more rows than `max_rows` and all of autograd take torch's
    way as before. Exact layers in fp32 keep torch, whose bits greedy decoding promises to
    reproduce; subclasses of `nn.Linear` keep their own forward. Nothing is changed where the
    compiled kernels are missing or TAMIS_BACKEND forbids them.
    """
    for module in network.modules():
        if type(module) is not nn.Linear or not readable(module.weight):
            continue
        if native_for(None) is not None:
            # A method, for a deep copy of the module binds it to the copy.
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def max_rows(dtype: torch.dtype) -> int:
    """Up to how many rows the kernel runs here for weights of a dtype."""
    cpu = cpu_features()
    pairs = dtype == torch.bfloat16 and cpu.avx512_bf16 and not cpu.amx
    return MAX_ROWS if pairs else FEW_ROWS


def readable(weight: torch.Tensor) -> bool:
    """Whether the kernel serves layers with this weight."""
    matrix = matrix_of(weight)
    return (
        matrix is not None
        and (matrix.scales is not None or matrix.weight.dtype in SERVED)
        and matrix.weight.is_cpu
        and matrix.weight.is_contiguous()
    )


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`nn.Linear.forward` of `module`, for any x [..., in]."""
    weight, bias, extension = module.weight, module.bias, native_module()
    matrix = matrix_of(weight)
    if (
        extension is None
        or matrix is None
        or torch.is_grad_enabled()
        or not _alike(x, matrix)
        or not (bias is None or bias.dtype == x.dtype)
    ):
        return F.linear(x, weight, bias)
    return linear(extension, x, matrix.weight, bias, matrix.scales)


def _alike(x: torch.Tensor, matrix: Matrix) -> bool:
    """Whether the kernel can multiply the two; a layer may have been converted since it was given
    the kernel, and torch says best what is wrong with an input."""
    width = matrix.weight.shape[1]
    return (
        0 < x.numel() <= max_rows(x.dtype) * width
        and x.shape[-1] == width
        and matrix.meets(x.dtype)
        and x.is_cpu
        and matrix.weight.is_cpu
    )
