"""`tamis demo`: a long prompt and eight at once, measured and checked against 🤗 Transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamis.cli import options, terminal
from tamis.cli.run import read_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

    from tamis.cli.workload import Cost, Workload

_SHOWN = 64
"""Characters of the generated text that are printed: enough to see what kind of text it is."""


def demo(
    model: options.OptionalModel = None,
    document: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text of the prompts; by default Python's own library."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of the long prompt; the eight are 1/8 of it.")
    ] = 8192,
    dtype: options.Dtype = "auto",
    kv_memory: options.KVMemory = "1GiB",
    debug: options.Debug = False,
) -> None:
    """Run a long prompt and eight at once, here and in 🤗 Transformers, and compare.

    Without --model it makes a small model of random weights: its text is noise, but exactness,
    memory and time are those of any model of its shape. Exits with status 1 if the two do not
    generate the same tokens in float32.
    """
    from tamis.cli.demo_model import library_text, save_random_model

    terminal.quiet_logs(debug)
    out = terminal.output_console()
    text = library_text() if document is None else read_text(document)
    with tempfile.TemporaryDirectory(prefix="tamis-demo-") as scratch:
        if model is None:
            model = scratch
            save_random_model(Path(scratch), library_text())
            out.print(
                "This model has [bold]random weights[/bold], made on the spot: its text is noise. "
                "Only exactness, memory and time mean anything."
            )
        exact = _compare(out, model, text, tokens, dtype, kv_memory)
    if not exact:
        raise typer.Exit(1)


def _compare(
    out: Console, model: str, text: str, n_tokens: int, dtype: str, kv_memory: str
) -> bool:
    """Print the comparison; returns False if the tokens differ where they must be equal."""
    from tamis.cli import workload
    from tamis.cli.peer import TransformersPeer
    from tamis.llm import LLM
    from tamis.platform import format_bytes

    # One engine at a time is in memory: each is dropped before the next is loaded.
    llm = LLM(model, dtype=dtype, kv_memory=kv_memory)
    work = workload.prepare(llm, text, n_tokens)
    settings = llm.model.dtype, llm.model.device
    n_parameters = llm.model.n_parameters
    out.print(
        f"{llm.model.architecture}, {n_parameters / 1e6:,.1f} M parameters, "
        f"{str(llm.model.dtype).removeprefix('torch.')} on {llm.model.device}; "
        f"one prompt of {len(work.long):,} tokens, then {len(work.concurrent)} of "
        f"{len(work.concurrent[0]):,}; {workload.NEW_TOKENS} new tokens each"
    )
    ours, answer = workload.measure_tamis(llm, work)
    formula = llm.model.kv_bytes_per_token * (len(work.long) + workload.NEW_TOKENS - 1)
    del llm
    out.print(f"it goes on: {answer[:_SHOWN]!r}", markup=False)
    with out.status("the same in Transformers"):
        theirs = workload.measure_transformers(TransformersPeer(model, *settings), work)
    out.print(_table(ours, theirs, work, formula))
    out.print(
        f"The {workload.CONCURRENT} requests run at once in tamis, one by one in Transformers. The "
        f"formula for keys and values gives {format_bytes(formula)}; pages hold positions too."
    )

    with out.status("checking tokens in float32"):
        n_equal = workload.equal_tokens(model, work.long, kv_memory, settings[1], n_parameters)
    total = workload.CHECKED_TOKENS
    if n_equal is None:
        out.print("greedy tokens: not compared, for want of memory for the weights in float32")
        return True
    verdict = "identical" if n_equal == total else "[bold red]different[/bold red], equal"
    out.print(
        f"greedy tokens in float32 against Transformers' — {verdict}: {n_equal}/{total} tokens"
    )
    return n_equal == total


def _table(ours: Cost, theirs: Cost, work: Workload, formula: int) -> Table:
    """Both costs side by side."""
    from rich.table import Table

    from tamis.platform import format_bytes

    n_long = len(work.long)
    table = Table()
    table.add_column("", no_wrap=True)
    for column in ("tamis", "Transformers", "compared"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(label: str, text: Callable[[Cost], str], speed: Callable[[Cost], float]) -> None:
        ratio = speed(ours) / speed(theirs)
        verdict = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
        table.add_row(label, text(ours), text(theirs), verdict)

    row(
        f"prefill of {n_long:,} tokens",
        lambda cost: f"{cost.prefill_s:.2f} s",
        lambda cost: 1 / cost.prefill_s,
    )
    rates = (f"{n_long / cost.prefill_s:,.0f} tokens/s" for cost in (ours, theirs))
    table.add_row("", *rates, "")
    row(
        "decode after it",
        lambda cost: f"{1e3 * cost.decode_s:.1f} ms/token",
        lambda cost: 1 / cost.decode_s,
    )
    row(
        f"{len(work.concurrent)} requests",
        lambda cost: f"{cost.tokens_per_s:,.0f} tokens/s",
        lambda cost: cost.tokens_per_s,
    )
    sizes = (format_bytes(cost.kv_bytes) for cost in (ours, theirs))
    table.add_row("KV cache, long prompt", *sizes, f"{ours.kv_bytes / formula:.2f}x formula")
    return table
