"""What every command that writes a report says of its run, and needs installed."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tamis import __version__

if TYPE_CHECKING:
    from tamis.bench.record import Record, Settings


def missing_libraries() -> str | None:
    """Why a report could not be made here, and what to do about it; None where it can."""
    missing = [name for name in ("jinja2", "plotly") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return (
        f"the report needs {' and '.join(missing)}; install what it needs with: "
        "pip install 'tamis[bench]'"
    )


def record_of(settings: Settings) -> Record:
    """The record of this command on this machine, now."""
    import torch
    import transformers

    from tamis.bench.record import Record
    from tamis.cli.machine import this_machine
    from tamis.platform import format_bytes

    machine = this_machine()
    facts = {
        "processor": f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used",
        "instruction sets": ", ".join(machine.instruction_sets) or "none of those kernels look for",
        "memory": format_bytes(machine.memory),
        "GPUs": ", ".join(machine.gpus) or "none",
        "attention": ", ".join(name for name, runs in machine.backends.items() if runs),
        "system": platform.platform(),
    }
    versions = {
        "tamis": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    command = shlex.join(["tamis", *sys.argv[1:]])
    return Record(settings, facts, versions, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", command)
