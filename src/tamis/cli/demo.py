"""`tamis demo`: facts hidden in a long text are found and measured, here and in 🤗 Transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamis.cli import options, terminal
from tamis.cli.reporting import missing_libraries, record_of
from tamis.cli.run import read_text

if TYPE_CHECKING:
    from rich.console import Console

    from tamis.llm import LLM
    from tamis.plan import Plan

_SHOWN = 64
"""Characters of the generated text that are printed: enough to see what kind of text it is."""

_DEPTHS = 5

_RANDOM = (
    "No model ships with this copy of tamis, so here is one of [bold]random weights[/bold], made "
    "on the spot: its text is noise and no facts are asked of it. Only exactness, memory and time "
    "mean anything."
)


def demo(
    model: options.OptionalModel = None,
    document: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text to hide facts in.", show_default="Python's own library"
        ),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            metavar="PLANS",
            help="Plans to compare, with ; between them; may be given several times.",
            show_default="all that there are",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Length of the text that is read.", show_default="8192, or all of it"
        ),
    ] = None,
    report: Annotated[
        Path, typer.Option(metavar="FILE", help="The report, an HTML page that works offline.")
    ] = Path("out/demo.html"),
    dtype: options.Dtype = "auto",
    kv_memory: options.KVMemory = "1GiB",
    debug: options.Debug = False,
) -> None:
    """Find facts hidden in a long text, under every plan, and measure what that takes.

    Then the same text goes through 🤗 Transformers, for comparison. Without a model it makes one
    of random weights: it finds nothing, but exactness, memory and time are those of any model of
    its shape. Exits with status 1 if the two do not generate the same tokens in float32.

    Example: tamis demo --document report.txt
    """
    from tamis.bench.lists import parse_plans
    from tamis.bench.tasks.corpus import haystack_lines
    from tamis.cli import demo_compare, workload
    from tamis.cli.demo_facts import PLANS
    from tamis.cli.demo_model import library_text, save_random_model
    from tamis.llm import LLM
    from tamis.shipped import locate

    plans = parse_plans(plan or PLANS)
    if document is not None:
        read_text(str(document))  # its errors are those of every file of text
    text = "".join(haystack_lines(document))
    terminal.quiet_logs(debug)
    out = terminal.output_console()
    with tempfile.TemporaryDirectory(prefix="tamis-demo-") as scratch:
        directory = str(Path(scratch, "model")) if model is None else locate(model)
        if model is None:
            save_random_model(Path(directory), library_text())
            out.print(_RANDOM)
        # One engine at a time is in memory: each is dropped before the next is loaded.
        llm = LLM(model or directory, dtype=dtype, kv_memory=kv_memory)
        work = workload.prepare(llm, text, tokens)
        weights = llm.model.dtype, llm.model.device
        n_parameters = llm.model.n_parameters
        name = "" if model is None else f"{llm.model.name}: "
        out.print(
            f"{name}{llm.model.architecture}, {n_parameters / 1e6:,.1f} M parameters, "
            f"{str(weights[0]).removeprefix('torch.')} on {weights[1]}"
        )
        reported = model is not None and _find_facts(
            out, llm, plans, document, text, len(work.long), report, Path(scratch)
        )
        ours, goes_on = workload.measure_tamis(llm, work)
        if model is None:
            out.print(f"it goes on: {goes_on[:_SHOWN]!r}", markup=False)
        formula = llm.model.kv_bytes_per_token * (len(work.long) + workload.NEW_TOKENS - 1)
        del llm
        demo_compare.compare(out, directory, weights, work, ours, formula)
        exact = demo_compare.check(out, directory, weights[1], work, kv_memory, n_parameters)
    if reported:
        out.print(f"report: {report}", markup=False)
    if not exact:
        raise typer.Exit(1)


def _find_facts(
    out: Console,
    llm: LLM,
    plans: dict[str, Plan],
    document: Path | None,
    text: str,
    length: int,
    report: Path,
    scratch: Path,
) -> bool:
    """Ask for hidden facts, print what came of it, and write the report.

    Returns:
        Whether it was written: libraries that it needs may be missing.
    """
    from tamis.cli import demo_facts

    exercises = demo_facts.hide(llm, document, length, scratch)
    source = "Python's own library" if document is None else document.name
    out.print(
        f"{len(exercises)} questions on facts hidden in {length:,} tokens of {source}", markup=False
    )
    missing = missing_libraries()
    if missing is None:
        from tamis.bench.report import check_writable

        check_writable(report)
    summary = demo_facts.ask(llm, exercises, plans, text, scratch)
    demo_facts.show(out, exercises, summary)
    if missing is not None:
        terminal.say(missing)
        return False
    from tamis.bench.report import write_report

    write_report(report, record_of(demo_facts.settings(llm, document)), summary, _DEPTHS)
    return True
