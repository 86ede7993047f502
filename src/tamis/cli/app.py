"""The `tamis` command: its subcommands, and the one place where every run of it ends.

Exit statuses: 0 done, 2 an error the user can act on (one line on stderr), 130 interrupted,
141 the reader of stdout went away.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tamis import __version__
from tamis.cli import serve as serving
from tamis.cli import terminal
from tamis.cli.bench import bench
from tamis.cli.client_bench import client_bench
from tamis.cli.demo import demo
from tamis.cli.info import info
from tamis.cli.inspect import inspect
from tamis.cli.lm_eval import lm_eval
from tamis.cli.methods import methods
from tamis.cli.run import run
from tamis.cli.train import train
from tamis.errors import TamisError


class Commands(TyperGroup):
    """The group of all subcommands; turns what ends them into an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminal.plain_warnings(), terminal.quiet_imports():
                return super().invoke(ctx)
        except TamisError as error:
            if terminal.debugging(ctx):
                raise
            terminal.say("error: " + " ".join(str(error).split()))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            terminal.say("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            terminal.discard_stdout()
            raise typer.Exit(141) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of options where a terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(info)
app.command()(inspect)
app.command()(demo)
app.command()(bench)
app.command()(methods)
app.command(context_settings={"auto_envvar_prefix": serving.PREFIX})(serving.serve)
app.command("client-bench")(client_bench)
app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    lm_eval
)
app.add_typer(train)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tamis {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def tamis(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Run long prompts through a language model, with exact attention on per-head KV pages.

    Start with `tamis demo`, or with `tamis run --model DIR --prompt-file FILE --question TEXT`.
    Each command explains its options: `tamis run --help`.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
