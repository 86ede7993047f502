"""tamis against other engines on this machine, and all of them against what it allows.

    python benchmarks/peers_install.py      # once: each peer in an environment of its own
    python benchmarks/peers.py              # an hour or two on two cores
    python benchmarks/peers.py --quick      # small sizes, a minute: whether it runs at all
    python benchmarks/peers.py --only 27M   # parts whose names begin so; --list shows them

Models have random weights, which does not change the time. Each engine has a process to itself;
they take turns (A B A B ...), so that what else the machine does meets all of them. Every part that
is done is one line of results/peers.jsonl, and a run goes on where the last one stopped; Ctrl-C
loses only the part that runs. In the end results/peers.json, docs/performance.md and its pictures
are written anew from all lines.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from peers_install import ENVIRONMENTS, PEERS, is_installed, python_of
from peers_page import page as render
from peers_page import write_page
from peers_roster import ENGINES, PARTS, Part, quick_parts, shape_of
from peers_run import run
from peers_summary import QUIET, summarize
from tamis.cli.machine import this_machine
from tamis.cli.terminal import quiet_logs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.jsonl"
SUMMARY = HERE / "results" / "peers.json"
MODEL_FILES = ENVIRONMENTS / "models"


def records(path: Path) -> dict[str, dict[str, Any]]:
    """The latest record of each part, by its name; none where there is no file.

    Raises:
        json.JSONDecodeError: a line is not one.
    """
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["part"]["name"]: line for line in lines}


def chosen(parts: tuple[Part, ...], only: list[str] | None) -> list[Part]:
    """The parts whose names begin with one of `only`, or all."""
    return [part for part in parts if not only or part.name.startswith(tuple(only))]


def model_directory(model: str, gguf: bool) -> Path:
    """The model's files, written when they are first needed."""
    shape = shape_of(model)
    directory = MODEL_FILES / f"{model}-{shape.layers}x{shape.hidden}-{shape.max_tokens}"
    if not (directory / "config.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as unfinished:
            shape.save(Path(unfinished) / "model")
            (Path(unfinished) / "model").rename(directory)
    if gguf and not (directory / "model.gguf").exists():
        command = [python_of("llama.cpp"), HERE / "peers_gguf.py", directory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory


def measure(parts: list[Part], threads: int, path: Path, console: Console) -> None:
    """Run parts and append a line for each to the file."""
    logs = ENVIRONMENTS / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts, start=1):
        start = time.perf_counter()
        gguf = any(ENGINES[name].needs_gguf for name in part.engines)
        directory = model_directory(part.model, gguf)
        title = f"[{i}/{len(parts)}] {part.name}"
        with console.status(title) as status:
            record = run(
                part,
                directory,
                threads,
                logs,
                lambda text, title=title, status=status: status.update(f"{title}: {text}"),
            )
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        console.print(f"{title}: {time.perf_counter() - start:.0f} s")
        for name, why in record["failed"].items():
            console.print(f"  {name} failed: {why}")
        if record["others"] > QUIET:
            console.print(f"  other processes took {record['others']:.0%} of the processors")


def _kept(path: Path, quick: bool) -> str:
    """What a run that is stopped leaves behind, and how to go on."""
    if quick:
        return "nothing is kept of --quick"
    return f"{path} keeps parts: {len(records(path))}; the same command goes on with the rest"


def _check_installed(parts: list[Part]) -> None:
    needed = {ENGINES[name].environment for part in parts for name in part.engines} - {None}
    missing = [peer for peer in PEERS if peer in needed and not is_installed(peer)]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}; run python {HERE.name}/peers_install.py "
            f"{' '.join(missing)}"
        )


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, about a minute; nothing is kept.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Parts whose names begin so; can be repeated.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also parts that are done.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show the parts, and which are done.")] = (
        False
    ),
    page: Annotated[bool, typer.Option("--page", help="Only write the page anew.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 2,
) -> None:
    """Measure tamis against other engines."""
    quiet_logs(debug=False)
    # Engines are ended with the benchmark, however it is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(threads)
    console = Console(stderr=True, highlight=False)
    done = records(RESULTS)
    if show:
        for part in PARTS:
            print(f"{'done ' if part.name in done else '     '}{part.name}")
        return
    parts = chosen(quick_parts() if quick else PARTS, only)
    if not parts:
        sys.exit(f"no part begins with {' or '.join(only or [])}; --list shows them")
    if not (quick or again):
        parts = [part for part in parts if part.name not in done]
    if page:
        parts = []
    _check_installed(parts)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "quick.jsonl" if quick else RESULTS
        try:
            measure(parts, threads, path, console)
        except KeyboardInterrupt:
            console.print(f"stopped; {_kept(path, quick)}", soft_wrap=True)
            raise typer.Exit(130) from None
        summary = summarize(list(records(path).values()), this_machine())
    if quick:
        print(render(summary))
        return
    SUMMARY.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for written in write_page(summary):
        console.print(f"written: {written}")


if __name__ == "__main__":
    typer.run(main)
