"""How many threads to use on a machine that others use too."""

from __future__ import annotations

import time

import psutil
import torch

_BUSY, _IDLE = 0.6, 0.3  # processors kept busy by others, above which to yield, below which to take
_INTERVAL = 5.0  # seconds between looks


class ThreadGovernor:
    """Keeps one of `most` threads back for each processor that other programs keep busy.

    A parallel region ends when its slowest thread does, so two threads on a machine with one free
    processor are many times slower than one.
    """

    def __init__(self, most: int) -> None:
        self.threads = most
        self._most = most
        self._process = psutil.Process()
        self._looked = time.monotonic()
        self._others = self._others_seconds()
        torch.set_num_threads(most)

    def adjust(self) -> None:
        """Look every few seconds, and set PyTorch's number of threads."""
        now = time.monotonic()
        if now - self._looked < _INTERVAL:
            return
        others = self._others_seconds()
        busy = (others - self._others) / (now - self._looked)
        self._looked, self._others = now, others
        free = psutil.cpu_count() or 1
        if busy > _BUSY:
            threads = max(1, min(self._most, round(free - busy)))
        elif busy < _IDLE:
            threads = self._most
        else:
            return
        if threads != self.threads:
            self.threads = threads
            torch.set_num_threads(threads)

    def _others_seconds(self) -> float:
        total = psutil.cpu_times()
        used = total.user + total.system + total.nice
        used += total.irq + total.softirq + total.steal
        own = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                spent = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += spent.user + spent.system
        return float(used - own)
