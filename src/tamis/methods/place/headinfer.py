"""HeadInfer: the KV of most heads lies in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Place, param
from tamis.methods.views import ModelShape


@dataclass(frozen=True)
class HeadInfer(Place):
    """The pages of all but a few heads lie in host memory and come to the device head by head.

    While one head's attention is computed the next one's pages arrive, so the device holds the KV
    of a few heads only and results stay exact (HeadInfer: head-wise offloading). A share
    `resident` of all KV heads stays on the device. The paper's long-context setting keeps none
    there beyond the heads in flight, which is the default.

    Departure: the paper keeps groups of heads chosen per model; here the resident heads are spread
    evenly over layers and heads, so that every layer has as much transfer to hide.
    """

    paper: ClassVar[str] = (
        "HeadInfer: Memory-Efficient LLM Inference by Head-wise Offloading (arXiv:2502.12574)"
    )
    resident: float = param(
        0.0, "share of the KV heads that stay on the device", minimum=0.0, maximum=1.0
    )

    def on_device(self, shape: ModelShape) -> list[Tensor]:
        heads = [layer.kv_heads for layer in shape.layers]
        total = sum(heads)
        count = round(self.resident * total)
        # Head i stays where the line of slope count / total passes a whole number.
        passed = torch.arange(total + 1) * count // max(1, total)
        return list(torch.split(passed.diff() > 0, heads))
