"""The part of `tamis demo` that runs the same prompts in 🤗 Transformers and compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from tamis.cli import workload
from tamis.cli.peer import TransformersPeer
from tamis.cli.workload import Cost, Workload
from tamis.platform import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from rich.console import Console


def compare(
    out: Console,
    model: str,
    settings: tuple[torch.dtype, torch.device],
    work: Workload,
    ours: Cost,
    formula: int,
) -> None:
    """Run `work` in Transformers and print its cost beside `ours`.

    Args:
        model: the directory. `settings`: dtype and device of the weights.
        formula: bytes of the keys and values of the long prompt and its new tokens.
    """
    with out.status("the same in Transformers"):
        theirs = workload.measure_transformers(TransformersPeer(model, *settings), work)
    out.print(_table(ours, theirs, work, formula))
    out.print(
        f"The {workload.CONCURRENT} requests run at once in tamis, one by one in Transformers. The "
        f"formula for keys and values gives {format_bytes(formula)}; pages hold positions too."
    )


def check(
    out: Console,
    model: str,
    device: torch.device,
    work: Workload,
    kv_memory: str,
    n_parameters: int,
) -> bool:
    """Compare greedy tokens in float32 and print the verdict; False if any differs."""
    with out.status("checking tokens in float32"):
        n_equal = workload.equal_tokens(model, work.long, kv_memory, device, n_parameters)
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
