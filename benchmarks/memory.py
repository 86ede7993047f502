"""How much memory a prompt takes, measured in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from contestants import Contestant
from tamis.cli.terminal import quiet_logs

_WARM_UP = 64


def peak_growth(
    load: Callable[[Path], Contestant],
    directory: Path,
    prompt: Sequence[int],
    n_tokens: int,
    threads: int,
) -> int | None:
    """The most that resident memory grew over that of the loaded, warm model, in a fresh process.

    Args:
        load: makes the contestant from the model's directory; picklable, so a class.
        directory: the model.
        prompt: the prompt, token ids.
        n_tokens: tokens to generate after it.
        threads: torch's threads.

    Returns:
        Bytes, or None where the system is not Linux.
    """
    if not Path("/proc/self/status").exists():
        return None
    fresh = multiprocessing.get_context("spawn")  # a fork would share the parent's memory
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(_measure, load, directory, prompt, n_tokens, threads).result()


def _measure(
    load: Callable[[Path], Contestant],
    directory: Path,
    prompt: Sequence[int],
    n_tokens: int,
    threads: int,
) -> int:
    quiet_logs(debug=False)
    torch.set_num_threads(threads)
    contestant = load(directory)
    contestant.prefill(prompt[:_WARM_UP])
    contestant.decode(1)
    before = _resident("VmRSS")
    # Not allowed everywhere; without it the peak may be that of loading.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    contestant.prefill(prompt)
    contestant.decode(n_tokens)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of resident memory of this process: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024
