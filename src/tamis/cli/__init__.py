"""The command line: `tamis run`, `tamis info`, `tamis demo`.

Modules here import torch and Transformers only inside the commands that need them, so that
`tamis --help` answers at once.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of `tamis` and of `python -m tamis`; ends the process with an exit status."""
    from tamis.cli.app import app

    app(prog_name="tamis")
