"""`tamis train`: the models that tamis makes itself, and what methods learn about any model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tamis.cli import options, terminal, train_methods
from tamis.errors import ConfigError, ModelError

INTERRUPTED = 130

train = typer.Typer(
    name="train",
    no_args_is_help=True,
    help="Train the small model that ships with tamis, or fit a method to any model.",
)

Run = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Folder of the training run; one that is there already is gone on with."
    ),
]

Folder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the finished model.")]

_RUN = Path("out/reference")
_MODEL = Path("models/reference")


@train.command("reference")
def train_reference(
    run: Run = _RUN,
    out: Folder = _MODEL,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0.1,
            help="How long to train; pauses and other programs' time do not count.",
            show_default="80, on a GPU 30",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many steps to train, instead of --minutes."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides weights and data.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, or auto: cuda where there is one.")
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Most threads to use.", show_default="all"),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that compose training data.")
    ] = 1,
    mirror: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for a second copy of checkpoints.")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Train the reference model from nothing, then export and measure it.

    The text is the Python standard library's: nothing is downloaded. On a GPU the model is larger.
    Ctrl-C saves a checkpoint, and so does a timer; the same command goes on from there.

    Example: tamis train reference --minutes 75 --out models/reference
    """
    _say_if_curves_are_missing()
    terminal.quiet_logs(debug)
    from tamis.model.loading import parse_device
    from tamis.train import reference
    from tamis.train.recipe import cpu_recipe, gpu_recipe

    if minutes is not None and steps is not None:
        raise ConfigError("--minutes and --steps were both given; give one of them")
    device = str(parse_device(device))
    make = gpu_recipe if device.startswith("cuda") else cpu_recipe
    recipe = make(minutes=minutes, steps=steps, seed=seed)
    with _writing():
        finished = reference.train(
            run, recipe, device=device, threads=threads, workers=workers, mirror=mirror
        )
    if not finished:
        raise typer.Exit(INTERRUPTED)
    _export(run, out)
    _evaluate(out, quick=False)


@train.command()
def export(run: Run = _RUN, out: Folder = _MODEL, debug: options.Debug = False) -> None:
    """Write a run's last checkpoint as a model directory; training may go on meanwhile."""
    _say_if_curves_are_missing()
    terminal.quiet_logs(debug)
    _export(run, out)


@train.command()
def evaluate(
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="DIR", help="Folder of the finished model.")
    ] = _MODEL,
    quick: Annotated[bool, typer.Option("--quick", help="Only a few samples per task.")] = False,
    debug: options.Debug = False,
) -> None:
    """Measure what an exported model can do, and write the scores into its model card."""
    terminal.quiet_logs(debug)
    _evaluate(model, quick)


train.command()(train_methods.razorattention)
train.command()(train_methods.duoattention)
train.command()(train_methods.minference)


def _export(run: Path, out: Path) -> None:
    from tamis.train.export import export

    with _writing():
        export(run, out)
    typer.echo(f"wrote {out}")


def _evaluate(model: Path, quick: bool) -> None:
    from tamis.train import card
    from tamis.train.evaluate import evaluate_folder

    missing = [name for name in ("config.json", "training.json") if not (model / name).is_file()]
    if missing:
        raise ModelError(
            f"{model} has no {missing[0]}; give a directory that `tamis train export` wrote"
        )
    with _writing():
        evaluate_folder(model, quick=quick, say=typer.echo)
        card.write(model)
    typer.echo(f"wrote the scores into {model / 'README.md'}")


@contextmanager
def _writing() -> Iterator[None]:
    """Inside, a folder or file that cannot be written is a ConfigError that names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error


def _say_if_curves_are_missing() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        terminal.say(
            "matplotlib is not installed, so the curves are not drawn; get it with: "
            "pip install 'tamis[bench]'"
        )
