"""How numbers are written in tables and reports."""

from __future__ import annotations

NOTHING = "–"  # noqa: RUF001


def length_text(length: int | None) -> str:
    """A length in tokens: 8k for 8192, 1000 for 1000, "as published" for None."""
    if length is None:
        return "as published"
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def perplexity(value: float | None) -> str:
    """A perplexity, to two decimals."""
    return NOTHING if value is None else f"{value:,.2f}"


def seconds(value: float) -> str:
    """A time with its unit, to about three digits."""
    number, unit = (value, "s") if value >= 0.9995 else (1000 * value, "ms")
    decimals = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{decimals}f} {unit}"


def ratio(value: float) -> str:
    """A ratio to a baseline."""
    return f"{value:.2f}×"  # noqa: RUF001


def mebibytes(n_bytes: float) -> str:
    """Bytes in MiB, to about three digits."""
    number = n_bytes / 2**20
    decimals = 3 if number < 1 else 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{decimals}f}"
