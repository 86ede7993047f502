"""Batches from other processes, a few steps ahead of the one that trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from tokenizers import Tokenizer

from tamis.train.data import Batch, Composer
from tamis.train.recipe import Stage
from tamis.train.text import TokenText

_AHEAD = 3


def save_text(text: TokenText, folder: Path) -> None:
    """Save a token text where the composing processes find it."""
    np.savez(folder / "text.npz", tokens=text.tokens.astype(np.uint16), newline=text.newline)


def load_text(folder: Path) -> TokenText:
    """Load what `save_text` saved."""
    with np.load(folder / "text.npz") as saved:
        tokens, newline = saved["tokens"].astype(np.int64), int(saved["newline"])
    return TokenText.of(tokens, newline)


class BatchSource:
    """Composes the batches of a run in `workers` processes; use it as a context manager.

    `folder` holds the tokenizer (in `tokenizer/`) and the token text (`save_text`).
    """

    def __init__(self, folder: Path, seed: int, workers: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_compose, args=(there, folder, seed), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        self._asked: deque[tuple[int, Stage]] = deque()

    def get(self, step: int, stage: Stage) -> Batch:
        """The batch of `step`; asks for the next ones at once. Steps are taken in order."""
        while self._asked and self._asked[0] != (step, stage):
            self._receive()
        ahead = self._asked[-1][0] + 1 if self._asked else step
        for asked in range(ahead, step + _AHEAD * len(self._connections)):
            self._connection(asked).send((asked, stage))
            self._asked.append((asked, stage))
        return self._receive()

    def _receive(self) -> Batch:
        step, _ = self._asked.popleft()
        batch: Batch = self._connection(step).recv()
        return batch

    def _connection(self, step: int) -> Connection:
        return self._connections[step % len(self._connections)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()


def _compose(requests: Connection, folder: Path, seed: int) -> None:
    """Answer requests until the other side closes; interrupts are the training loop's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processors are for training
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    composer = Composer(load_text(folder), tokenizer)
    while True:
        try:
            step, stage = requests.recv()
            requests.send(composer.batch(stage.blend, seed, step, stage.batch, stage.length))
        except (EOFError, OSError):
            return
