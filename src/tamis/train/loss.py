"""The training loss, on the selected positions only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tamis.train.data import ANSWER, FIRST, TEXT, Batch
from tamis.train.model import logits_at


class Inputs(NamedTuple):
    """The fields of a `tamis.train.data.Batch` that the loss needs, on the model's device."""

    tokens: Tensor
    positions: Tensor
    where: Tensor
    targets: Tensor
    classes: Tensor

    @classmethod
    def of(cls, batch: Batch, device: str) -> Inputs:
        arrays = (batch.tokens, batch.positions, batch.where, batch.targets, batch.classes)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


class Losses(NamedTuple):
    """total: the scalar to differentiate; answer, text: its terms; right [batch, selected] bool."""

    total: Tensor
    answer: Tensor
    text: Tensor
    right: Tensor


def losses(
    model: Qwen3ForCausalLM, inputs: Inputs, text_weight: float, first_weight: float
) -> Losses:
    """Mean cross-entropy of answers, plus `text_weight` times that of library text.

    The first token of every recalled
    value counts `first_weight` times: it is the one that needs the look-up, the rest is copying.
    """
    logits = logits_at(model, inputs.tokens, inputs.positions, inputs.where)
    targets, classes = inputs.targets, inputs.classes
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    each = each.view(targets.shape)
    weight = (classes == ANSWER).float() + first_weight * (classes == FIRST).float()
    text = (classes == TEXT).float()
    answer_loss = (each * weight).sum() / weight.sum().clamp(min=1)
    text_loss = (each * text).sum() / text.sum().clamp(min=1)
    right = (logits.argmax(-1) == targets).detach()
    return Losses(
        answer_loss + text_weight * text_loss, answer_loss.detach(), text_loss.detach(), right
    )
