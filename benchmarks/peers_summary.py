"""What the samples of `benchmarks/peers.py` say: medians, limits, ratios, targets."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import tamis
from peers_install import PEERS
from peers_roster import CONTINUOUS, ENGINES, LLAMA_CPP, TAMIS, TRANSFORMERS, shape_of
from report import best_rates
from tamis.cli.machine import Machine, Rates
from timing import Spread

Record = Mapping[str, Any]
QUIET = 0.05
"""The share of the processors that others may take before a part's times are doubted."""
STEPS = ("prefill_s", "decode_s")


@dataclass(frozen=True)
class Verdict:
    """A target: tamis must be at least so many times as fast as another engine, or need at most
    so many times what the limit says."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def summarize(records: Sequence[Record], machine: Machine) -> dict[str, Any]:
    """Everything that the page shows, ready for JSON.

    Args:
        records: lines of the results, one per part.
        machine: where they come from.

    Returns:
        "series", a row per model, context and engine; "crowds", a row per part of several requests
        and engine; "targets"; and what was measured where, when and with which versions.
    """
    series = _series([r for r in records if not r["part"]["requests"]])
    crowds = _crowds([r for r in records if r["part"]["requests"]])
    quiet = [record for record in records if _is_quiet(record)]
    verdicts = _verdicts(
        _series([r for r in quiet if not r["part"]["requests"]]),
        _crowds([r for r in quiet if r["part"]["requests"]]),
    )
    return {
        "benchmark": "peers",
        "dates": sorted(record["date"] for record in records),
        "machine": asdict(machine),
        "versions": {
            "python": platform.python_version(),
            "tamis": tamis.__version__,
            "peers": {name: list(peer.packages) for name, peer in PEERS.items()},
        },
        "rates": {
            name: asdict(Spread.of([record["rates"][name] for record in records]))
            for name in (records[0]["rates"] if records else ())
        },
        "unwatched": [r["part"]["name"] for r in records if r["others"] is None],
        "disturbed": {
            record["part"]["name"]: record["others"] for record in records if not _is_quiet(record)
        },
        "failed": {
            f"{record['part']['name']}: {engine}": why
            for record in records
            for engine, why in record["failed"].items()
        },
        "targets": [asdict(verdict) | {"met": verdict.met} for verdict in verdicts],
        "series": series,
        "crowds": crowds,
    }


def _is_quiet(record: Record) -> bool:
    """Whether a part had the machine to itself, as far as is known (the first parts that are on
    record were not watched); targets are judged by such parts alone."""
    return (record["others"] or 0.0) <= QUIET


def _series(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of one request: a row per model, context and engine, over all parts that measured it."""

    def place(record: Record) -> tuple[int, str, int]:
        part = record["part"]
        return shape_of(part["model"]).parameters, part["model"], part["tokens"]

    rows = []
    for (_, model, tokens), group in itertools.groupby(sorted(records, key=place), place):
        parts = list(group)
        rates = best_rates([Rates(**part["rates"]) for part in parts])
        for engine in ENGINES:
            within = [part for part in parts if "decode_s" in part["samples"].get(engine, {})]
            if within:
                rows.append(_series_row(model, tokens, engine, within, rates))
    return rows


def _series_row(
    model: str, tokens: int, engine: str, parts: Sequence[Record], rates: Rates
) -> dict[str, Any]:
    shape = shape_of(model)
    samples = {what: _pooled(parts, engine, what) for what in STEPS}
    last = parts[-1]["samples"][engine]
    paired = [part for part in parts if "decode_s" in part["samples"].get(TAMIS, {})]
    return {
        "model": model,
        "tokens": tokens,
        "engine": engine,
        **{what: asdict(Spread.of(values)) for what, values in samples.items()},
        "to_tamis": {
            what: median(_pooled(paired, engine, what)) / median(_pooled(paired, TAMIS, what))
            for what in (STEPS if paired else ())
        },
        # Every weight and this engine's own keys and values are read once per token.
        "limit": {
            "prefill_s": shape.prefill_flops(tokens) / rates.matmul_bf16_flops,
            "decode_s": (shape.decode_bytes(0) + last["kv_bytes"]) / rates.read_bytes_per_s,
        },
        "kv_bytes": last["kv_bytes"],
        "peak_bytes": max(part["samples"][engine]["memory"]["peak"] for part in parts),
        "growth_bytes": max(_growth(part["samples"][engine]) for part in parts),
        "profile": last.get("profile"),
    }


def _crowds(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of several requests: a row per part and engine."""
    rows = []
    for record in records:
        part, rates = record["part"], Rates(**record["rates"])
        ours = _rates_of(record["samples"].get(TAMIS, {}))
        for engine, samples in record["samples"].items():
            found = _rates_of(samples)
            if not found["tokens_per_s"]:
                continue
            rows.append(
                {
                    **{name: part[name] for name in ("model", "requests", "tokens", "new_tokens")},
                    "engine": engine,
                    **{name: asdict(Spread.of(values)) for name, values in found.items() if values},
                    "tamis_to_it": (
                        median(ours["tokens_per_s"]) / median(found["tokens_per_s"])
                        if ours["tokens_per_s"]
                        else None
                    ),
                    "limit": _crowd_limit(part, rates),
                    "peak_bytes": samples["memory"]["peak"],
                    "growth_bytes": _growth(samples),
                }
            )
    return rows


def _crowd_limit(part: Record, rates: Rates) -> dict[str, float]:
    """Tokens per second if prompts ran at the matmul rate and each step read weights once."""
    shape, n, new = shape_of(part["model"]), part["requests"], part["new_tokens"]
    step_s = shape.decode_bytes(part["tokens"] + new // 2, n) / rates.read_bytes_per_s
    prompts_s = n * shape.prefill_flops(part["tokens"]) / rates.matmul_bf16_flops
    return {
        "tokens_per_s": n * new / (prompts_s + new * step_s),
        "decode_tokens_per_s": n / step_s,
    }


def _verdicts(series: list[dict[str, Any]], crowds: list[dict[str, Any]]) -> list[Verdict]:
    """The targets whose numbers are there."""
    rows = {(row["model"], row["tokens"], row["engine"]): row for row in series}
    result = []

    def beats(model: str, tokens: int, other: str, what: str, bound: float) -> None:
        row = rows.get((model, tokens, other))
        if row is not None and row["to_tamis"]:
            step = "prefill" if what == "prefill_s" else "decode"
            name = f"{model}, {tokens:,} tokens: {step}, times as fast as {other}"
            result.append(Verdict(name, row["to_tamis"][what], bound, at_least=True))

    def within(model: str, tokens: int, what: str, bound: float) -> None:
        row = rows.get((model, tokens, TAMIS))
        if row is not None:
            step = "prefill" if what == "prefill_s" else "decode"
            name = f"{model}, {tokens:,} tokens: {step}, times the limit"
            value = row[what]["median"] / row["limit"][what]
            result.append(Verdict(name, value, bound, at_least=False))

    within("0.5B", 8192, "decode_s", 1.4)
    within("0.5B", 8192, "prefill_s", 2)
    beats("27M", 32_768, TRANSFORMERS, "decode_s", 3)
    beats("27M", 32_768, LLAMA_CPP, "decode_s", 2)
    beats("27M", 32_768, TRANSFORMERS, "prefill_s", 1.5)
    beats("27M", 32_768, LLAMA_CPP, "prefill_s", 1.5)
    beats("0.5B", 2048, LLAMA_CPP, "decode_s", 1)
    beats("0.5B", 8192, LLAMA_CPP, "decode_s", 1)
    for row in crowds:
        if row["requests"] == 8 and row["engine"] in (TRANSFORMERS, CONTINUOUS, LLAMA_CPP):
            name = f"{row['model']}, 8 requests: tokens/s, times those of {row['engine']}"
            if row["tamis_to_it"] is not None:
                result.append(Verdict(name, row["tamis_to_it"], 3, at_least=True))
    return result


def _pooled(parts: Sequence[Record], engine: str, what: str) -> list[float]:
    """All samples of an engine in some parts."""
    return [value for part in parts for value in part["samples"][engine][what]]


def _rates_of(samples: Record) -> dict[str, list[float]]:
    """Tokens per second, all in all and while decoding."""
    answers = samples.get("throughput", ())
    return {
        name: [answer[name] for answer in answers if not math.isnan(answer[name])]
        for name in ("tokens_per_s", "decode_tokens_per_s")
    }


def _growth(samples: Record) -> int:
    """The most that resident memory grew over that of the loaded, warm engine."""
    return samples["memory"]["peak"] - samples["resident_before"]["resident"]
