"""One engine in a process of its own, told what to do by lines of JSON.

    python peers_worker.py MODULE:CLASS DIRECTORY THREADS OPTIONS

Reads requests from standard input, {"do": NAME, ...}, and answers each with one line on standard
output, {"value": ...} or {"error": "..."}; the first answer says that the model is loaded. Runs in
the engine's own environment, so it needs nothing but Python. Whatever libraries print goes to
standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from contestants import OneByOne


class Worker:
    """The engine and what it can be asked.

    Args:
        engine: a `Contestant`, a `Crowd`, or both.
        vocab: token ids of prompts are below it.
    """

    def __init__(self, engine: Any, vocab: int) -> None:
        self._engine = engine
        self._vocab = vocab

    def prefill(self, tokens: int, seed: str) -> float:
        """Seconds for a random prompt of so many tokens."""
        return self._engine.prefill(self._prompt(tokens, seed))

    def decode(self, tokens: int) -> float:
        """Seconds per token."""
        return self._engine.decode(tokens)

    def answer(self, requests: int, tokens: int, new_tokens: int, seed: str) -> dict[str, Any]:
        """A `Throughput`, of as many random prompts."""
        crowd = self._engine if hasattr(self._engine, "answer") else OneByOne(self._engine)
        prompts = [self._prompt(tokens, f"{seed}/{i}") for i in range(requests)]
        return asdict(crowd.answer(prompts, new_tokens))

    def kv_bytes(self) -> int:
        """Of the sequence as it is."""
        return self._engine.kv_bytes

    def profile(self, tokens: int) -> dict[str, float] | None:
        """Where the time of decoding goes, seconds per token, of an engine that can tell."""
        return self._engine.profile(tokens) if hasattr(self._engine, "profile") else None

    def watch_memory(self) -> dict[str, int]:
        """Resident bytes now; the peak counts from here, where the system allows that."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return {"resident": _resident("VmRSS")}

    def memory(self) -> dict[str, int]:
        """Resident bytes now, and at most since `watch_memory`."""
        return {"resident": _resident("VmRSS"), "peak": _resident("VmHWM")}

    def _prompt(self, tokens: int, seed: str) -> list[int]:
        return random.Random(seed).choices(range(self._vocab), k=tokens)


def _resident(field: str) -> int:
    """Bytes of resident memory of this process, from Linux's record."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


def serve(load: Callable[[], Worker]) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print; answers have their own line

    def answer(work: Callable[[], Any]) -> Any:
        try:
            value = work()
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
            return None
        print(json.dumps({"value": None if isinstance(value, Worker) else value}), file=answers)
        return value

    worker = answer(load)
    if worker is None:
        return
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        answer(lambda request=request, name=name: getattr(worker, name)(**request))


def main() -> None:
    """Load what the command line names, and serve."""
    kind, directory, threads, options = sys.argv[1:]
    module, name = kind.split(":")

    def load() -> Worker:
        with contextlib.suppress(ModuleNotFoundError):
            import_module("torch").set_num_threads(int(threads))
        engine = getattr(import_module(module), name)(Path(directory), **json.loads(options))
        config = json.loads((Path(directory) / "config.json").read_text())
        return Worker(engine, config["vocab_size"])

    with contextlib.suppress(KeyboardInterrupt):
        serve(load)


if __name__ == "__main__":
    main()
