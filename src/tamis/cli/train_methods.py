"""`tamis train METHOD`: what a method must learn about a model before it can be used with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamis.cli import options, terminal
from tamis.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tamis.model import Model
    from tamis.train.methods.duoattention import Report

INTERRUPTED = 130

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for the file; a plan looks for it in the folder tamis of the model.",
        show_default="MODEL/tamis",
    ),
]

Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, or auto: cuda where there is one.")
]

Seed = Annotated[int, typer.Option(metavar="N", help="Decides what the model is given to read.")]

Text = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text to read.", show_default="Python's standard library"),
]


def razorattention(
    model: options.Model,
    out: Out = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Random tokens; fewer if the context is short.")
    ] = 2500,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=2, help="How often they are repeated.")
    ] = 4,
    seed: Seed = 0,
    dtype: options.Dtype = "auto",
    device: Device = "auto",
    debug: options.Debug = False,
) -> None:
    """Score every head by its attention to repeated random tokens, for RazorAttention.

    Example: tamis train razorattention --model DIR
    """
    terminal.quiet_logs(debug)
    from tamis.train.methods import razorattention as method

    loaded, folder = _loaded(model, out, dtype, device)
    found = method.fit(loaded, tokens=tokens, repeats=repeats, seed=seed)
    _show(loaded, found)
    setting = {"tokens": tokens, "repeats": repeats, "seed": seed}
    _save(found, folder, "razorattention", setting)


def duoattention(
    model: options.Model,
    out: Out = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="How many documents to learn from.", show_default="200"
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", min=0.01, help="How long to learn, instead.")
    ] = None,
    length: Annotated[int, typer.Option(metavar="N", min=64, help="Tokens of a document.")] = 2048,
    sinks: Annotated[
        int, typer.Option(metavar="N", min=0, help="First tokens that a streaming head keeps.")
    ] = 64,
    recent: Annotated[
        int, typer.Option(metavar="N", min=1, help="Recent tokens that a streaming head keeps.")
    ] = 256,
    penalty: Annotated[
        float, typer.Option(metavar="X", min=0, help="How much an open gate costs.")
    ] = 0.05,
    text: Text = None,
    seed: Seed = 0,
    dtype: options.Dtype = "auto",
    device: Device = "auto",
    debug: options.Debug = False,
) -> None:
    """Learn which heads need the whole context, for DuoAttention.

    The model's weights stay as they are: one gate per KV head is learned, from documents with
    facts that the model is asked for. Ctrl-C ends it early and keeps what is learned.

    Example: tamis train duoattention --model DIR --minutes 10
    """
    terminal.quiet_logs(debug)
    from tamis.train.methods import duoattention as method

    if minutes is not None and steps is not None:
        raise ConfigError("--minutes and --steps were both given; give one of them")
    if minutes is None and steps is None:
        steps = 200
    loaded, folder = _loaded(model, out, dtype, device)
    setting = method.Setting(
        length=length, sinks=sinks, recent=recent, penalty=penalty, haystack=text, seed=seed
    )
    shown = -1

    def show(report: Report) -> None:
        nonlocal shown
        if int(20 * report.progress) > shown:
            shown = int(20 * report.progress)
            terminal.say(
                f"step {report.step:>5}  {report.progress:4.0%}  distance {report.distance:.2e}  "
                f"mean gate {report.mean_gate:.3f}"
            )

    learned = method.fit(loaded, setting, steps=steps, minutes=minutes, report=show)
    _show(loaded, {"gates": learned.gates})
    used = asdict(setting) | {"steps": learned.steps}
    _save({"gates": learned.gates}, folder, "duoattention", used)
    if not learned.finished:
        terminal.say(f"interrupted after {learned.steps} steps")
        raise typer.Exit(INTERRUPTED)


def minference(
    model: options.Model,
    out: Out = None,
    length: Annotated[
        int, typer.Option(metavar="N", min=256, help="Tokens of the document that is read.")
    ] = 8192,
    keys: Annotated[
        int, typer.Option(metavar="N", min=64, help="Keys that a query may read on average.")
    ] = 1024,
    text: Text = None,
    seed: Seed = 0,
    dtype: options.Dtype = "auto",
    device: Device = "auto",
    debug: options.Debug = False,
) -> None:
    """Find for every head which sparse pattern changes its output least, for MInference.

    Example: tamis train minference --model DIR --length 16384 --keys 2048
    """
    terminal.quiet_logs(debug)
    from tamis.train.methods import minference as method
    from tamis.train.methods.documents import conversations

    loaded, folder = _loaded(model, out, dtype, device)
    ids, _ = next(conversations(loaded, length, haystack=text, seed=seed))
    found = method.fit(
        loaded, ids, keys=keys, report=lambda layer: terminal.say(f"searched layer {layer}")
    )
    for index, layer in enumerate(loaded.layers):
        if layer.window is None:
            for head in range(layer.q_heads):
                name = method.NAMES[int(found.kind[index, head])]
                sizes = " ".join(map(str, found.size[index, head].tolist()))
                error = f"error {float(found.error[index, head]):.4f}"
                typer.echo(f"layer {index:>3}  head {head:>3}  {name:14}  {sizes:12}  {error}")
    setting = {"length": length, "keys": keys, "haystack": text, "seed": seed}
    _save({"kind": found.kind, "size": found.size}, folder, "minference", setting)


def _loaded(name: str, out: Path | None, dtype: str, device: str) -> tuple[Model, Path]:
    """The model, and the folder that fitted files go to, which is there then.

    Raises:
        ConfigError: the folder is not given, and the model has none of its own; or it cannot be
            made.
    """
    from tamis.model import load_model
    from tamis.shipped import locate

    directory = Path(locate(name)).expanduser()
    if out is None and not directory.is_dir():
        raise ConfigError(
            f"{name} is not a directory, so there is no folder beside it for what is fitted; "
            "give --out DIR"
        )
    folder = out or directory / "tamis"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return load_model(name, dtype, device), folder


def _show(model: Model, found: dict[str, Tensor]) -> None:
    """One line per layer and kind of score."""
    for index, layer in enumerate(model.layers):
        for name, scores in found.items():
            row = " ".join(f"{score:.4f}" for score in scores[index, : layer.kv_heads].tolist())
            typer.echo(f"layer {index:>3}  {name:9}  {row}")


def _save(
    found: dict[str, Tensor], folder: Path, method: str, setting: Mapping[str, object]
) -> None:
    from tamis.train.methods.save import save

    with _writing(folder):
        path = save(found, folder, method, setting)
    typer.echo(f"wrote {path}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Inside, a folder that cannot be written is a ConfigError that names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}") from error
