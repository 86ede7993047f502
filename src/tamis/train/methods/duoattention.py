"""DuoAttention's gates: how much each KV head needs more than first and recent tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tamis.errors import ModelError
from tamis.model import Model
from tamis.train.methods.differentiable import causal_attention
from tamis.train.methods.documents import conversations
from tamis.train.methods.save import stacked

_RAMP = 0.2  # share of the training in which the rate rises, and in which it falls
_LOW = 0.1  # where it begins and ends


@dataclass(frozen=True)
class Setting:
    """What is learned from, and how.

    Attributes:
        length: tokens of a document.
        sinks, recent: first and recent tokens of a streaming head.
        penalty: weight of the gates' sum in the loss; rate: of learning.
        haystack: text that facts are hidden in; None for the held-out standard library.
        seed: decides the documents.
    """

    length: int = 2048
    sinks: int = 64
    recent: int = 256
    penalty: float = 0.05
    rate: float = 0.02
    haystack: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """One step: its number, how much of the training is done after it, the distance that it found,
    and the mean gate that it left."""

    step: int
    progress: float
    distance: float
    mean_gate: float


@dataclass(frozen=True)
class Gates:
    """gates fp32 [layers, most KV heads], layers with fewer padded with 0; `finished` is False if
    the training was interrupted after `steps` steps."""

    gates: Tensor
    steps: int
    finished: bool


class GatedAttention:
    """An `Attend` that mixes, in every KV head, full and streaming attention by the head's gate.

    Args:
        gates: per layer fp32 [kv_heads]; None for layers that attend as they always do.
        sinks, recent: first and recent tokens of a streaming head.
    """

    def __init__(self, gates: Sequence[Tensor | None], sinks: int, recent: int) -> None:
        self._gates, self._sinks, self._recent = gates, sinks, recent

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        attend = partial(
            causal_attention, q, k, v, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
        out = attend()
        gate = self._gates[layer]
        if gate is not None:
            streaming = attend(first_tokens=self._sinks, recent_tokens=self._recent)
            alpha = gate.repeat_interleave(q.shape[1] // k.shape[1])[:, None]
            out = alpha * out + (1 - alpha) * streaming
        return out.to(q.dtype)


def fit(
    model: Model,
    setting: Setting,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    report: Callable[[Report], None] = lambda _: None,
) -> Gates:
    """Learn the gates of a model whose own weights stay as they are (DuoAttention, section 2.3).

    Every step reads one document with questions and their answers, and lowers
    `mean |H_full - H_mixed|^2 + penalty sum gates`: H are the last hidden states from which the
    answers' tokens are predicted, with full attention and with the gates' mixture; the mean is
    over tokens and elements. Gates begin at 1 and stay in 0..1. The learning rate rises to `rate`
    over the first fifth of the training and falls over the last. Ctrl-C ends it early.

    The paper has documents with ten passkeys of 32 words to recite; here they are the benchmark's
    own conversations about facts hidden in text, which small models understand too. Layers with a
    sliding window keep a gate of 1, and no part in the loss.

    Args:
        steps, minutes: how long; one of them is given.
        report: called after each step.

    Raises:
        ModelError: the model has no tokenizer, or no layer without a sliding window.
        ConfigError: `haystack` cannot be read, or `length` does not suit the facts or the model.
    """
    gates = [
        torch.ones(layer.kv_heads, device=model.device, requires_grad=layer.window is None)
        for layer in model.layers
    ]
    learned = [gate for gate in gates if gate.requires_grad]
    if not learned:
        raise ModelError(
            f"all layers of {model.name} have a sliding window; no gate is to be learned"
        )
    documents = conversations(model, setting.length, haystack=setting.haystack, seed=setting.seed)
    optimizer = torch.optim.Adam(learned, lr=setting.rate)
    began, step, progress, finished = time.monotonic(), 0, 0.0, False
    try:
        for ids, asked in documents:
            for group in optimizer.param_groups:
                group["lr"] = setting.rate * _ramp(progress)
            distance = _distance(model, gates, ids, asked, setting)
            loss = distance + setting.penalty * torch.cat(learned).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            with torch.no_grad():
                for gate in learned:
                    gate.clamp_(0, 1)
            step += 1
            done = step / steps if steps is not None else 0.0
            if minutes is not None:
                done = max(done, (time.monotonic() - began) / 60 / minutes)
            progress = min(1.0, done)
            mean = torch.cat(learned).detach().mean()
            report(Report(step, progress, float(distance.detach()), float(mean)))
            if progress >= 1:
                finished = True
                break
    except KeyboardInterrupt:
        pass
    return Gates(stacked([gate.detach() for gate in gates]), step, finished)


def _distance(
    model: Model, gates: Sequence[Tensor], ids: Tensor, asked: Tensor, setting: Setting
) -> Tensor:
    """Mean squared distance of the last hidden states at `asked`, with and without gates."""
    at = torch.arange(len(ids), device=ids.device)
    lengths = torch.full_like(at, len(ids))
    own = [gate if gate.requires_grad else None for gate in gates]
    full, mixed = (
        model.train_forward(
            ids, at, at[:0], GatedAttention(used, setting.sinks, setting.recent), lengths, True
        )[asked].float()
        for used in ([None] * len(gates), own)
    )
    return (full - mixed).square().mean()


def _ramp(progress: float) -> float:
    """The learning rate's factor: from `_LOW` up to 1, and down again at the end."""
    rise = min(progress, 1 - progress) / _RAMP
    return _LOW + (1 - _LOW) * min(1.0, rise)
