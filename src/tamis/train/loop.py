"""The training loop: one process that trains, others that compose batches."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from tamis.train import checkpoint, log
from tamis.train.clock import Clock
from tamis.train.data import FIRST, Batch
from tamis.train.loss import Inputs, losses
from tamis.train.machine import ThreadGovernor
from tamis.train.optim import Muon, split_parameters
from tamis.train.recipe import Recipe
from tamis.train.screen import Screen
from tamis.train.source import BatchSource

_REPORT_EVERY = 20  # steps
_SAVE_EVERY = 110.0  # seconds
_DRAW_EVERY = 600.0  # seconds


@dataclass(frozen=True)
class Place:
    """Where a run lives and what it may use of the machine."""

    folder: Path
    mirror: Path | None
    device: str
    threads: int
    workers: int
    compiled: bool


class Report:
    """Sums over the steps since the last report."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.steps = 0
        self.tokens = 0
        self.answer = 0.0
        self.text = 0.0
        self.firsts: dict[str, tuple[int, int]] = {}

    def add(
        self, batch: Batch, answer: float, text: float, firsts: dict[str, tuple[int, int]]
    ) -> None:
        self.steps += 1
        self.tokens += batch.tokens.size
        self.answer += answer
        self.text += text
        for task, (right, count) in firsts.items():
            before = self.firsts.get(task, (0, 0))
            self.firsts[task] = (before[0] + right, before[1] + count)

    def record(self, clock: Clock, threads: int) -> dict[str, Any]:
        spent = max(time.monotonic() - self.began, 1e-9)
        return {
            "step": clock.step,
            "length": clock.stage.length,
            "minutes": round(clock.seconds / 60, 2),
            "progress": round(clock.progress, 4),
            "answer_loss": round(self.answer / self.steps, 4),
            "text_loss": round(self.text / self.steps, 4),
            "first": {k: round(r / n, 3) for k, (r, n) in sorted(self.firsts.items())},
            "tokens_per_s": round(self.tokens / spent),
            "tokens": clock.tokens,
            "lr_scale": round(clock.lr_scale, 3),
            "threads": threads,
        }


def run(model: Qwen3ForCausalLM, recipe: Recipe, place: Place, screen: Screen) -> bool:
    """Train `model` in place until the budget is used; True if it is, False if interrupted.

    Goes on from the checkpoint in `place.folder` if there is one, and leaves one behind at every
    exit, also by Ctrl-C or SIGTERM.
    """
    matrices, others = split_parameters(model)
    muon = Muon(matrices, lr=recipe.matrix_lr)
    adam = torch.optim.AdamW(
        others, lr=recipe.other_lr, betas=(0.9, 0.97), eps=1e-10, weight_decay=0.0
    )
    clock = Clock(recipe)
    saved = checkpoint.load(place.folder, place.device)
    if saved is not None:
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        clock = Clock(recipe, **saved["clock"])
        screen.note(f"goes on at step {clock.step}, {clock.progress:.0%} of the budget")

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "clock": clock.state(),
        }
        checkpoint.save(state, place.folder, place.mirror)

    def draw() -> None:
        log.draw(log.read(place.folder / "log.jsonl"), place.folder / "curves.png")

    loss = losses
    if place.compiled:
        options: dict[str, Any] | None = None
        if place.device == "cpu":
            options = {"cpp.dynamic_threads": True}
        loss = torch.compile(losses, dynamic=False, options=options)
    governor = ThreadGovernor(place.threads)
    report = Report()
    saved_at = drawn_at = time.monotonic()
    with BatchSource(place.folder, recipe.seed, place.workers) as source, _interrupts() as stop:
        while not clock.done and not stop:
            began = time.monotonic()
            batch = source.get(clock.step, clock.stage)
            inputs = Inputs.of(batch, place.device)
            result = loss(model, inputs, recipe.text_weight, recipe.first_weight)
            torch.autograd.backward(result.total)
            _set_rates(muon, adam, recipe, clock)
            for optimizer in (muon, adam):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            firsts = _firsts(batch, result.right.cpu().numpy())
            report.add(batch, float(result.answer), float(result.text), firsts)
            accuracies = {task: right / count for task, (right, count) in firsts.items()}
            moved = clock.advance(time.monotonic() - began, accuracies)
            governor.adjust()
            if clock.step % _REPORT_EVERY == 0 or clock.done:
                record = report.record(clock, governor.threads)
                log.append(place.folder / "log.jsonl", record)
                screen.show(record)
                report = Report()
            if moved:
                screen.note(f"step {clock.step}: sequences of {clock.stage.length} tokens")
            now = time.monotonic()
            if now - saved_at > _SAVE_EVERY or moved:
                save()
                saved_at = time.monotonic()
            if now - drawn_at > _DRAW_EVERY:
                draw()
                drawn_at = time.monotonic()
    save()
    draw()
    return clock.done


def _set_rates(muon: Muon, adam: torch.optim.AdamW, recipe: Recipe, clock: Clock) -> None:
    for group in muon.param_groups:
        group["lr"] = recipe.matrix_lr * clock.lr_scale
        group["momentum"] = min(0.95, 0.85 + 0.1 * clock.step / 200)
    for group in adam.param_groups:
        group["lr"] = recipe.other_lr * clock.lr_scale


def _firsts(batch: Batch, right: np.ndarray) -> dict[str, tuple[int, int]]:
    """Per task: (right, all) of the first tokens of recalled values in the batch."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    first = batch.classes == FIRST
    for index in np.unique(batch.tasks[first]):
        chosen = first & (batch.tasks == index)
        found[batch.names[index]] = (int(right[chosen].sum()), int(chosen.sum()))
    return dict(found)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, so that a step is finished before the exit."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
