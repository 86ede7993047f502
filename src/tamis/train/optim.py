"""Muon for the matrices inside the layers, AdamW for embeddings and norms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024), for 2-D weights.

    Each step moves a weight [rows, columns] by `lr * sqrt(max(1, rows / columns))` along the
    nearest semi-orthogonal matrix to its Nesterov momentum, found by five Newton-Schulz iterations
    in bf16. Weights of one shape are iterated together.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                directions = []
                for param in params:
                    state = self.state[param]
                    if not state:
                        state["momentum"] = torch.zeros_like(param)
                    grad = param.grad
                    assert grad is not None  # chosen above
                    state["momentum"].lerp_(grad, 1 - group["momentum"])
                    directions.append(grad.lerp(state["momentum"], group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                updates = orthogonalized(torch.stack(directions))
                for param, update in zip(params, updates, strict=True):
                    param.add_(update, alpha=-scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix's singular value decomposition.

    matrices [count, rows, columns]; returns the same shape in fp32. Singular values end up between
    about 0.7 and 1.2, which is as good as 1 for an update and much cheaper.
    """
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result.float()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the layers, everything else), each in the model's order."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        (matrices if param.ndim == 2 and ".layers." in name else others).append(param)
    return matrices, others
