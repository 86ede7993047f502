"""An engine that runs in a process of its own, as the benchmark sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from peers_install import python_of
from peers_roster import Engine

_WORKER = Path(__file__).parent / "peers_worker.py"
_LOAD_S = 300


class EngineError(RuntimeError):
    """An engine could not do what it was asked."""


class Process:
    """A running engine. Idle, it waits for its next line and takes no processor time.

    Args:
        engine: what runs; directory: the model; threads: it computes with.
        log: where it prints to.

    Raises:
        EngineError: it cannot load the model.
    """

    def __init__(self, engine: Engine, directory: Path, threads: int, log: Path) -> None:
        options = dict(engine.options) | ({"threads": threads} if engine.threaded else {})
        python = python_of(engine.environment) if engine.environment else Path(sys.executable)
        self._log = log
        try:
            with log.open("a") as stderr:
                self._process = subprocess.Popen(
                    [python, _WORKER, engine.kind, directory, str(threads), json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
                    start_new_session=True,  # Ctrl-C is the benchmark's to handle
                )
        except OSError as error:
            raise EngineError(f"{python} cannot be run: {error}") from error
        try:
            self._answer(_LOAD_S)
        except EngineError:
            self.close()
            raise

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> Any:
        """What `Worker.<do>` returns.

        Raises:
            EngineError: it raised, died, or took longer than `timeout_s`.
        """
        assert self._process.stdin is not None
        request = json.dumps({"do": do, **arguments}) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has died, or was closed
            raise EngineError(f"the process has ended; its output is in {self._log}") from None
        return self._answer(timeout_s)

    @property
    def cpu_s(self) -> float:
        """Processor seconds that it has taken."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _answer(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready:
            raise EngineError(f"no answer in {timeout_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the process has ended; its output is in {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["value"]
