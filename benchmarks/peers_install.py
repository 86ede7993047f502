"""The engines that `benchmarks/peers.py` compares with, each in an environment of its own.

    python benchmarks/peers_install.py             # all of them, into build/peers/
    python benchmarks/peers_install.py llama.cpp   # one of them

llama.cpp is compiled for this machine, which takes 10 to 30 minutes on two cores. An environment
that is there and holds the pinned versions is left as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

ENVIRONMENTS = Path(__file__).parents[1] / "build" / "peers"
"""Where they go; git does not see it."""
_STAMP = "installed.txt"


@dataclass(frozen=True)
class Environment:
    """What one environment holds.

    Attributes:
        packages: pinned requirements; what they depend on is pip's choice.
        no_binary: of these, what is compiled here.
        variables: of the build.
    """

    packages: tuple[str, ...]
    no_binary: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def stamp(self) -> str:
        """What was asked for, as text."""
        pairs = (f"{name}={value}" for name, value in sorted(self.variables.items()))
        return "\n".join((*self.packages, *pairs)) + "\n"


PEERS = {
    "transformers": Environment(("torch==2.13.0", "transformers==5.23.0", "psutil==7.2.2")),
    # kvpress asks for transformers < 5.3.
    "kvpress": Environment(("torch==2.13.0", "kvpress==0.5.5", "transformers==5.2.0")),
    "llama.cpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6"),
        no_binary=("llama-cpp-python",),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which need not be there yet."""
    return ENVIRONMENTS / peer / "bin" / "python"


def is_installed(peer: str) -> bool:
    """Whether the environment is there, complete, and holds what is pinned now."""
    stamp = ENVIRONMENTS / peer / _STAMP
    return stamp.exists() and stamp.read_text() == PEERS[peer].stamp


def install(peer: str) -> None:
    """Make a peer's environment.

    Raises:
        subprocess.CalledProcessError: pip failed, having said why.
    """
    environment = PEERS[peer]
    directory = ENVIRONMENTS / peer
    venv.create(directory, with_pip=True, clear=True)
    subprocess.run(
        [
            *(python_of(peer), "-m", "pip", "install", "--disable-pip-version-check"),
            *(f"--no-binary={name}" for name in environment.no_binary),
            *environment.packages,
        ],
        env=os.environ | environment.variables,
        check=True,
    )
    (directory / _STAMP).write_text(environment.stamp)


def main(
    peers: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(PEERS)}; by default all.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Install again what is there.")] = False,
) -> None:
    """Install the peers of the benchmarks."""
    unknown = set(peers or ()) - PEERS.keys()
    if unknown:
        sys.exit(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    for peer in peers or PEERS:
        if not force and is_installed(peer):
            print(f"{peer}: is there")
            continue
        print(f"{peer}: {', '.join(PEERS[peer].packages)}", flush=True)
        install(peer)


if __name__ == "__main__":
    typer.run(main)
