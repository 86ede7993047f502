"""`tamis lm-eval`: EleutherAI's evaluation harness, run on tamis."""

from __future__ import annotations

import sys

import typer

from tamis.cli import terminal
from tamis.errors import ConfigError


def lm_eval(ctx: typer.Context) -> None:
    """Run the evaluation harness lm-eval on a model in tamis; every option is the harness's.

    --model_args takes pretrained, plan, dtype, kv_memory and others, as KEY=VALUE with commas
    between them; for values with commas, give JSON. Its own help: python -m lm_eval run --help

    Example: tamis lm-eval --model_args pretrained=DIR,plan=dense --tasks hellaswag --limit 50
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ConfigError(
            "the harness is not installed; get it with: pip install 'tamis[eval]'"
        ) from error
    from tamis.bench.lm_harness import NAME, register

    register()
    terminal.quiet_logs(debug=False)
    model = [] if "--model" in ctx.args else ["--model", NAME]
    before = sys.argv
    sys.argv = ["lm-eval", "run", *model, *ctx.args]  # the harness reads its options there
    try:
        cli_evaluate()
    finally:
        sys.argv = before
