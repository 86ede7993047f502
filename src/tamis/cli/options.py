"""The options that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

from tamis import shipped
from tamis.cli.terminal import say, set_debugging
from tamis.errors import ModelError


def _or_default(model: str | None) -> str | None:
    """`model`, or the reference model where it ships with this copy of tamis; stderr says so."""
    if model is not None or shipped.find() is None:
        return model
    say(f"model: {shipped.REFERENCE}, the small one that ships with tamis (--model for another)")
    return shipped.REFERENCE


def _some_model() -> str:
    model = _or_default(None)
    if model is None:
        raise ModelError(
            "no model is given, and none ships with this copy of tamis; give --model DIR"
        )
    return model


MODEL_HELP = (
    "Model directory in Hugging Face format (config, safetensors, tokenizer), hub name, or "
    f"{shipped.REFERENCE}: the model that ships with tamis."
)

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR",
        help=MODEL_HELP,
        default_factory=_some_model,
        show_default=shipped.REFERENCE,
    ),
]

OptionalModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR",
        help=MODEL_HELP,
        callback=_or_default,
        show_default=f"{shipped.REFERENCE}, if it is there",
    ),
]

PromptFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text to read, UTF-8; - is standard input.")
]

PromptText = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The text itself; - is standard input.")
]

Question = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What to ask, put after the text.")
]

Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Wrap the prompt in the model's chat template; by default where it has one.",
        show_default=False,
    ),
]

Plan = Annotated[
    str, typer.Option(metavar="PLAN", help="What becomes of the KV cache; dense keeps all of it.")
]

Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="bf16, fp16, fp32, or auto: bf16 where the processor multiplies it, else fp32.",
    ),
]

Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="int8 or int4: keep the weights of linear layers in so many bits.",
        show_default="those of --dtype",
    ),
]

KVMemory = Annotated[
    str, typer.Option(metavar="SIZE", help="Memory for the KV pages of all requests, e.g. 512MiB.")
]

MaxBatchTokens = Annotated[
    int, typer.Option(metavar="N", help="Most tokens of one step; longer prompts go in chunks.")
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show the traceback of an error.", callback=set_debugging, is_eager=True
    ),
]
