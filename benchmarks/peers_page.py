"""docs/performance.md: tamis beside other engines and the machine's limits.

    python benchmarks/peers_page.py    # results/peers.json -> docs/performance.md and its picture

What a person has to say of the numbers stands in results/peers_notes.md and is put below the
targets. The picture needs matplotlib (`pip install 'tamis[bench]'`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import peers_plot
from peers_roster import TAMIS, TRANSFORMERS, shape_of
from report import number

HERE = Path(__file__).parent
SUMMARY = HERE / "results" / "peers.json"
NOTES = HERE / "results" / "peers_notes.md"
PAGE = HERE.parent / "docs" / "performance.md"
_MIB = 1 << 20

Row = Mapping[str, Any]

_REPEAT = """## How to repeat it

    pip install 'tamis[bench]'
    python benchmarks/peers_install.py    # each peer in an environment of its own, build/peers/
    python benchmarks/peers.py            # goes on where it was stopped
    python benchmarks/peers.py --quick    # a minute: whether everything runs

`--list` shows the parts, `--only "27M 8k"` runs some of them, `--again` runs what is done. Each
part is one line of benchmarks/results/peers.jsonl with every sample; benchmarks/results/peers.json
sums them up, and this page is written from it. Nothing else should run meanwhile."""


def write_page(summary: Row) -> list[Path]:
    """Write the page and its picture; the files written."""
    notes = NOTES.read_text(encoding="utf-8") if NOTES.exists() else ""
    PAGE.write_text(page(summary, notes), encoding="utf-8")
    peers_plot.draw(summary["series"], peers_plot.PICTURE)
    return [PAGE, peers_plot.PICTURE]


def page(summary: Row, notes: str = "") -> str:
    """The whole page, in Markdown; `notes` are put below the targets."""
    parts = [
        _opening(summary),
        _targets(summary["targets"]),
        notes.strip(),
        "![prefill and decode over the context](performance.svg)",
    ]
    by_place = groupby(summary["series"], lambda row: (row["model"], row["tokens"]))
    for (model, tokens), rows in by_place:
        parts += [f"## {model}, {tokens:,} tokens of context", _series_table(list(rows))]
    if summary["crowds"]:
        parts += ["## Requests at once", _CROWD_WORDS]
    for rows in _crowd_groups(summary["crowds"]):
        parts.append(_crowd_table(rows))
    parts += [
        _profiles(summary["series"]),
        _disturbed(summary["disturbed"]),
        _unwatched(summary["unwatched"]),
        _failures(summary["failed"]),
        _REPEAT,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(summary: Row) -> str:
    machine, rates = summary["machine"], summary["rates"]
    days = sorted({date[:10] for date in summary["dates"]})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    versions = "\n".join(
        f"  - {name}: {', '.join(packages)}"
        for name, packages in summary["versions"]["peers"].items()
    )
    models = "\n".join(
        f"  - **{model}**: hidden {shape.hidden}, {shape.layers} layers, {shape.q_heads} heads on "
        f"{shape.kv_heads} KV heads of {shape.head_dim}, vocabulary {shape.vocab:,}, "
        f"{shape.parameters / 1e6:.0f} M parameters"
        for model in dict.fromkeys(row["model"] for row in summary["series"])
        for shape in (shape_of(model),)
    )
    read, matmul = (rates[name] for name in ("read_bytes_per_s", "matmul_bf16_flops"))
    return f"""# Performance

<!-- Written by benchmarks/peers_page.py from benchmarks/results/peers.json; edit those. -->

tamis beside the engines that users would pick instead, in the same run on the same machine, and
beside what the machine allows.

- Machine: {machine["cores"]}-core {machine["cpu"]}, {", ".join(machine["instruction_sets"])}, torch
  {machine["torch"]}, two threads for every engine; {when}.
- Models: Llamas of random weights in bf16.
{models}
- Peers; llama.cpp is compiled for the machine and has bf16 weights too:
{versions}
- Times are medians of samples taken in turns, each engine in a process of its own, with the least
  and the greatest in brackets. One sample has none.
- Limits: floating point operations of a prompt over the bf16 matmul rate, and bytes of weights and
  of the engine's own KV cache over the read bandwidth. Both rates are measured before and after
  every part, and the best of a table's parts counts: {_range(matmul, 1e9)} GFLOP/s and
  {_range(read, 1e9)} GB/s in the run (the machine is a virtual one whose neighbours are felt).
- Dropping methods keep a tenth of the prompt; kivi is tamis's 4-bit or 2-bit KV. *Growth* is the
  peak of resident memory over that of the loaded and warm engine."""


def _range(spread: Row, scale: float) -> str:
    return f"{number(spread['low'] / scale)} to {number(spread['high'] / scale)}"


def _targets(targets: Sequence[Row]) -> str:
    if not targets:
        return ""
    rows = [
        [
            target["name"],
            f"{'≥' if target['at_least'] else '≤'} {target['bound']:g}",
            f"{target['value']:.2f}",
            "hit" if target["met"] else "**miss**",
        ]
        for target in targets
    ]
    return "## Targets\n\n" + _table(("what", "target", "measured", ""), rows)


def _series_table(rows: Sequence[Row]) -> str:
    columns = (
        *("engine", "prefill, s", "limit", "to tamis", "decode, ms per token", "limit", "to tamis"),
        *("KV, MiB", "growth, MiB"),
    )
    cells = []
    for row in rows:
        limit, other = row["limit"], row["to_tamis"]
        cells.append(
            [
                row["engine"],
                _spread(row["prefill_s"]),
                number(limit["prefill_s"]),
                f"{other['prefill_s']:.2f}" if other else "",
                _spread(row["decode_s"], 1e3),
                number(1e3 * limit["decode_s"]),
                f"{other['decode_s']:.2f}" if other else "",
                number(row["kv_bytes"] / _MIB),
                number(row["growth_bytes"] / _MIB),
            ]
        )
    return _table(columns, cells)


_CROWD_WORDS = f"""{TRANSFORMERS} and kvpress answer one request after the other; llama.cpp decodes
all of them in one batch after their prompts. Tokens per second count prompts too; *decode* counts
only the time in which all requests decode."""


def _crowd_groups(crowds: Sequence[Row]) -> list[list[Row]]:
    names = ("model", "requests", "tokens", "new_tokens")
    grouped = groupby(crowds, lambda row: tuple(row[name] for name in names))
    return [list(rows) for _, rows in grouped]


def _crowd_table(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = (
        f"{first['model']}, {first['requests']} requests of {first['tokens']:,} + "
        f"{first['new_tokens']} tokens"
    )
    columns = (title, "tokens/s", "limit", "tamis to it", "decode tokens/s", "limit", "growth, MiB")
    cells = [
        [
            row["engine"],
            _spread(row["tokens_per_s"]),
            number(row["limit"]["tokens_per_s"]),
            f"{row['tamis_to_it']:.2f}" if row["tamis_to_it"] else "",
            _spread(row["decode_tokens_per_s"]) if "decode_tokens_per_s" in row else "",
            number(row["limit"]["decode_tokens_per_s"]),
            number(row["growth_bytes"] / _MIB),
        ]
        for row in rows
    ]
    return _table(columns, cells)


def _profiles(series: Sequence[Row]) -> str:
    """Where a decode step of exact attention goes."""
    rows = [row for row in series if row["engine"] == TAMIS and row["profile"]]
    if not rows:
        return ""
    names = list(rows[0]["profile"])
    cells = [
        [
            f"{row['model']}, {row['tokens']:,} tokens",
            *(number(1e3 * row["profile"][name]) for name in names),
        ]
        for row in rows
    ]
    return (
        "## Where a decode step goes\n\nMilliseconds per token of exact attention, under Python's "
        "profiler, which slows down what is not a kernel. Norms, RoPE and activations are fused to "
        "the linear layers.\n\n" + _table(("", *names), cells)
    )


def _disturbed(parts: Mapping[str, float]) -> str:
    if not parts:
        return ""
    shares = ", ".join(f"{name} ({share:.0%})".replace("%", " %") for name, share in parts.items())
    return (
        "Parts in which other processes took more than a twentieth of the processors, so that "
        f"times are too long and uneven, and no target is judged by them: {shares}."
    )


def _unwatched(parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return (
        "Parts in which nobody watched what other processes took; their spreads are all that "
        f"speaks for them: {', '.join(parts)}."
    )


def _failures(failed: Mapping[str, str]) -> str:
    return "\n".join(f"- {what} failed: {why}" for what, why in failed.items())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(spread: Row, scale: float = 1.0) -> str:
    text = number(scale * spread["median"])
    if spread["n"] == 1:
        return text
    return f"{text} ({number(scale * spread['low'])} .. {number(scale * spread['high'])})"


def main() -> None:
    """Write the page from the summary."""
    for path in write_page(json.loads(SUMMARY.read_text(encoding="utf-8"))):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
