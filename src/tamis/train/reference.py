"""`tamis train reference`: train the small model that ships with the project, from nothing.

A run lives in one folder: the recipe, the tokenizer, the token text, the log with its curves, and
the last checkpoint. Training goes on from the checkpoint if there is one; `export` turns any
checkpoint into a model directory.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerFast

from tamis.bench.tasks.corpus import SourceFile, files_of, fingerprint
from tamis.errors import ConfigError
from tamis.train import card, loop
from tamis.train.evaluate import evaluate_folder
from tamis.train.export import export
from tamis.train.model import build_model
from tamis.train.recipe import Recipe, cpu_recipe, gpu_recipe
from tamis.train.screen import Screen
from tamis.train.source import save_text
from tamis.train.text import tokenize_files
from tamis.train.tokenizer import train_tokenizer

_BUDGET = ("minutes", "steps")  # a run may go on with another budget


def train(
    folder: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    workers: int = 1,
    mirror: Path | None = None,
    compiled: bool = True,
    progress: bool = True,
    files: Sequence[SourceFile] | None = None,
) -> bool:
    """Train, or go on training, the run in `folder`; True when its budget is used up.

    `recipe` must be the one that the run began with, but for its budget (ConfigError otherwise).
    `threads` is the most that PyTorch may use (default: all processors). `mirror` is a folder for
    a second copy of every checkpoint. `files` is the text, by default the training split of the
    standard library.
    """
    tokenizer = prepare(folder, recipe, device, files)
    model = build_model(recipe.shape, tokenizer, recipe.seed).to(device)
    place = loop.Place(
        folder=folder,
        mirror=mirror,
        device=device,
        threads=threads or torch.get_num_threads(),
        workers=workers,
        compiled=compiled,
    )
    with Screen(shown=progress) as screen:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        screen.note(f"{parameters:,} parameters; run in {folder}")
        done = loop.run(model, recipe, place, screen)
        if not done:
            screen.note("interrupted; the same command goes on from the checkpoint")
    return done


def prepare(
    folder: Path, recipe: Recipe, device: str, files: Sequence[SourceFile] | None
) -> PreTrainedTokenizerFast:
    """Make the run's folder, or check that it was made for this recipe; returns the tokenizer."""
    run_file = folder / "run.json"
    wanted = json.loads(json.dumps(recipe.as_dict()))
    if run_file.exists():
        begun = json.loads(run_file.read_text(encoding="utf-8"))["recipe"]
        differing = [key for key in wanted if key not in _BUDGET and begun.get(key) != wanted[key]]
        if differing:
            raise ConfigError(
                f"the run in {folder} began with another recipe; these differ: "
                f"{', '.join(sorted(differing))}. Go on with the same, or choose another folder"
            )
        return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    files = files if files is not None else files_of("train")
    tokenizer = train_tokenizer(file.text for file in files)
    tokenizer.save_pretrained(folder / "tokenizer")
    text = tokenize_files(files, tokenizer.backend_tokenizer)
    save_text(text, folder)
    about: dict[str, Any] = {
        "recipe": wanted,
        "corpus": {
            "python": platform.python_version(),
            "files": len(files),
            "characters": sum(len(file.text) for file in files),
            "tokens": len(text.tokens),
            "fingerprint": fingerprint(files),
        },
        "machine": {
            "processor": _processor(),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "torch": torch.__version__,
        },
    }
    run_file.write_text(json.dumps(about, indent=2), encoding="utf-8")
    return tokenizer


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


app = typer.Typer(help="Train the reference model, export it, evaluate it.", no_args_is_help=True)


RunFolder = Annotated[Path, typer.Option(help="Folder of the run; an old one is gone on with.")]
ModelFolder = Annotated[Path, typer.Option(help="Model directory.")]
_RUN, _MODEL = Path("out/reference"), Path("models/reference")


@app.command("train")
def train_command(
    run: RunFolder = _RUN,
    out: ModelFolder = _MODEL,
    minutes: Annotated[float | None, typer.Option(help="Budget, in active minutes.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget, in steps, instead.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Most threads to use.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that compose batches.")] = 1,
    mirror: Annotated[Path | None, typer.Option(help="Second folder for checkpoints.")] = None,
) -> None:
    """Train the reference model, a larger one where there is a GPU; export and evaluate it.

    Ctrl-C saves; the same command goes on where it stopped.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    make = gpu_recipe if device.startswith("cuda") else cpu_recipe
    recipe = make(minutes=minutes, steps=steps, seed=seed)
    if not train(run, recipe, device=device, threads=threads, workers=workers, mirror=mirror):
        raise typer.Exit(130)
    export_command(run, out)
    evaluate_command(out)


@app.command("export")
def export_command(run: RunFolder = _RUN, out: ModelFolder = _MODEL) -> None:
    """Write the last checkpoint as a 🤗 model directory; works while training goes on."""
    export(run, out)
    typer.echo(f"wrote {out}")


@app.command("evaluate")
def evaluate_command(
    model: ModelFolder = _MODEL,
    quick: Annotated[bool, typer.Option(help="A few samples of each task only.")] = False,
) -> None:
    """Measure the model-card scores, and renew the card with them."""
    evaluate_folder(model, quick=quick, say=typer.echo)
    card.write(model)


if __name__ == "__main__":
    app()
