"""The options that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

from tamis.cli.terminal import set_debugging

MODEL_HELP = "Model directory in Hugging Face format (config, safetensors, tokenizer), or hub name."

Model = Annotated[str, typer.Option("--model", "-m", metavar="DIR", help=MODEL_HELP)]

OptionalModel = Annotated[str | None, typer.Option("--model", "-m", metavar="DIR", help=MODEL_HELP)]

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
