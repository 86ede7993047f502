"""The page of an inspection: one HTML file that works without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tamis import files, pages
from tamis.inspection.result import Inspection
from tamis.platform import format_bytes

WHAT = "the page"


def write_page(path: Path, inspection: Inspection, highlight: Sequence[str]) -> None:
    """Write the page, whole or not at all.

    Raises:
        RequestError: a highlighted text stands nowhere in the prompt.
        ConfigError: the file cannot be written.
    """
    files.write_whole(path, render(inspection, highlight), WHAT)


def render(inspection: Inspection, highlight: Sequence[str] = ()) -> str:
    """The page as HTML; it requests nothing, and its own policy forbids it to.

    Raises:
        RequestError: a highlighted text stands nowhere in the prompt.
    """
    template = pages.environment("tamis.inspection").get_template("page.html.j2")
    return template.render(
        inspection=inspection,
        totals=totals(inspection),
        data=page_data(inspection, highlight),
        found=[mark for text in highlight for mark in marks(inspection, text)],
    )


def totals(inspection: Inspection) -> list[tuple[str, str, str]]:
    """The request in a few numbers: what, how much, compared with what."""
    metrics = inspection.metrics
    held, dense = sum(sum(layer.values()) for layer in inspection.bytes), metrics.kv_bytes_dense
    host = sum(layer.get("host", 0) for layer in inspection.bytes)
    rows = [
        (
            "KV memory",
            format_bytes(held),
            f"{share(held / dense)} of {format_bytes(dense)} dense"
            + (f", {format_bytes(host)} of it in host memory" if host else "")
            + f"; {format_bytes(metrics.kv_bytes_peak)} on the device at its peak",
        ),
        (
            "Prompt tokens kept",
            share(inspection.keep_counts().mean() / inspection.n_heads),
            f"of {inspection.n_prompt:,}, mean of {inspection.n_heads} KV heads",
        ),
        (
            "Prefill density",
            share(float(np.mean(inspection.density))),
            "of the prompt's pairs of queries and keys computed",
        ),
    ]
    steps = inspection.steps()
    if len(steps.generated):
        read = f"{steps.tokens.mean():,.0f}"
        note = f"tokens per head and step, {share(steps.share.mean())} of what dense reads"
        rows.append(("Read per step", read, note))
    return rows


def marks(inspection: Inspection, text: str) -> list[dict[str, Any]]:
    """Every place of a highlighted text, and what became of it.

    Raises:
        RequestError: it stands nowhere in the prompt.
    """
    kept = inspection.kept()
    places = []
    for tokens in inspection.find(text):
        of_heads = kept[:, tokens.start : tokens.stop]
        read = inspection.read_share(tokens)
        places.append(
            {
                "text": text,
                "start": tokens.start,
                "stop": tokens.stop,
                "whole": int(of_heads.all(1).sum()),
                "none": int((~of_heads.any(1)).sum()),
                "heads": inspection.n_heads,
                "kept": share(float(of_heads.mean())),
                "read": None if read is None else share(read),
            }
        )
    return places


def page_data(inspection: Inspection, highlight: Sequence[str]) -> dict[str, Any]:
    """What the page's script draws.

    Bits and counts are base64. `kept` has per layer and head a bit per prompt token, the first of
    a byte its highest. `pages` has per layer with selection a byte per step and page: how many
    heads read of it.
    """
    steps = inspection.steps()
    kept = iter(inspection.kept())
    return {
        "texts": inspection.prompt_texts,
        "kept": [
            [_base64(np.packbits(next(kept))) for _ in layer] for layer in inspection.positions
        ],
        "held": [[len(head) for head in layer] for layer in inspection.positions],
        "budgets": inspection.budgets,
        "windows": inspection.windows,
        "bytes": inspection.bytes,
        "denseBytes": inspection.dense_bytes,
        "density": inspection.density,
        "steps": steps.generated.tolist(),
        "tokensRead": steps.tokens.round(1).tolist(),
        "tokensDense": steps.dense.tolist(),
        "pages": _pages_read(inspection),
        "pageSize": inspection.page_size,
        "marks": [
            [tokens.start, tokens.stop] for text in highlight for tokens in inspection.find(text)
        ],
    }


def share(value: float) -> str:
    """A share as a percentage, exact where that matters: neither 0 nor all is rounded to."""
    if 0 < value < 0.001:
        return "under 0.1 %"
    if 0.999 < value < 1:
        return "over 99.9 %"
    return f"{100 * value:.3g} %"


def _pages_read(inspection: Inspection) -> dict[int, dict[str, Any]]:
    """Per layer with selection: the number of pages, and how many heads read each at each step."""
    steps = {step: i for i, step in enumerate(inspection.steps().generated.tolist())}
    found: dict[int, dict[str, Any]] = {}
    for layer in sorted({read.layer for read in inspection.reads if read.pages is not None}):
        reads = [read for read in inspection.reads if read.layer == layer]
        width = -(-max(max(read.cached) for read in reads) // inspection.page_size)
        counts = np.zeros((len(steps), width), dtype=np.uint8)
        for read in reads:
            for head, cached in enumerate(read.cached):
                of_head = range(-(-cached // inspection.page_size))
                counts[steps[read.step], list(read.pages[head] if read.pages else of_head)] += 1
        found[layer] = {"width": width, "counts": _base64(counts)}
    return found


def _base64(array: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
