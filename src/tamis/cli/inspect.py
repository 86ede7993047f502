"""`tamis inspect`: what a plan does to a prompt, as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamis.cli import options, terminal
from tamis.cli.run import encode_prompt, read_prompt

if TYPE_CHECKING:
    from tamis.inspection import Inspection


def inspect(
    model: options.Model,
    prompt_file: options.PromptFile = None,
    prompt: options.PromptText = None,
    question: options.Question = None,
    plan: options.Plan = "dense",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path(
        "tamis-inspect.html"
    ),
    find: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Outline this text of the prompt, such as the answer, and say how many heads "
            "keep it; may be given several times.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate.")] = 32,
    chat: options.Chat = None,
    dtype: options.Dtype = "auto",
    weights: options.Weights = None,
    kv_memory: options.KVMemory = "4GiB",
    max_batch_tokens: options.MaxBatchTokens = 2048,
    debug: options.Debug = False,
) -> None:
    """Show what a plan does to one prompt: what it keeps, stores and reads.

    Writes one page that needs no network, and prints a summary.

    Example: tamis inspect --prompt-file report.txt --question "What was decided?" --plan
    "snapkv(budget=0.1)" --find "decided to" --out page.html
    """
    from tamis.plan import Plan
    from tamis.sampling import SamplingParams

    text = read_prompt(prompt, prompt_file, question)
    its_plan = Plan.parse(plan)
    params = SamplingParams(max_tokens=max_tokens)
    from tamis.files import check_writable
    from tamis.inspection.page import WHAT
    from tamis.llm import LLM

    check_writable(out, WHAT)
    terminal.quiet_logs(debug)
    llm = LLM(
        model,
        plan=its_plan,
        dtype=dtype,
        weights=weights,
        kv_memory=kv_memory,
        max_batch_tokens=max_batch_tokens,
    )
    found = llm.inspect(encode_prompt(llm, text, chat), params=params)
    places = [line for wanted in find or () for line in _places(found, wanted)]
    found.to_html(out, find)
    for line in (*summary(found), *places):
        typer.echo(line)
    typer.echo(f"page: {out}")


def summary(inspection: Inspection) -> list[str]:
    """The request in a few lines, then a line per layer; columns are aligned."""
    from tamis.inspection.page import totals
    from tamis.platform import format_bytes

    lines = [f"plan: {inspection.plan}", f"answer: {inspection.output_text.strip()!r}"]
    lines += [f"{name.lower()}: {value} {note}" for name, value, note in totals(inspection)]
    steps = inspection.steps()
    rows = [("layer", "tokens held", "budget", "KV memory", "of dense", "density", "read per step")]
    for i, heads in enumerate(inspection.positions):
        n_bytes = sum(inspection.bytes[i].values())
        rows.append(
            (
                str(i),
                _span([len(head) for head in heads]),
                "-" if inspection.budgets is None else _span(inspection.budgets[i]),
                format_bytes(n_bytes),
                f"{n_bytes / inspection.dense_bytes[i]:.1%}",
                f"{inspection.density[i]:.1%}",
                f"{steps.tokens[:, i].mean():,.0f}" if len(steps.generated) else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        lines.append("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    return lines


def _places(inspection: Inspection, text: str) -> list[str]:
    """A line per place where a text stands: what became of it."""
    from tamis.inspection.page import marks

    lines = []
    for mark in marks(inspection, text):
        line = (
            f"{text!r} at tokens {mark['start']} to {mark['stop'] - 1}: {mark['whole']} of "
            f"{mark['heads']} KV heads keep all of it, {mark['none']} nothing; {mark['kept']} of "
            "its tokens are kept"
        )
        lines.append(line if mark["read"] is None else f"{line}, {mark['read']} read by the steps")
    return lines


def _span(numbers: tuple[int, ...] | list[int]) -> str:
    """Numbers as the least and the greatest of them."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
