"""Lengths follow the distributions that they are written as."""

from __future__ import annotations

import statistics
from random import Random

import pytest

from tamis.errors import ConfigError
from tamis.load.lengths import Fixed, Lengths, LogNormal, Uniform, parse


def drawn(lengths: Lengths) -> list[int]:
    random = Random(0)
    return [lengths.draw(random) for _ in range(4000)]


def test_they_are_read_as_they_are_written() -> None:
    assert parse("512") == Fixed(512)
    assert parse(" uniform(64,512)") == Uniform(64, 512)
    assert parse("lognormal(256, 0.5)") == LogNormal(256, 0.5)


def test_they_follow_their_distributions() -> None:
    assert set(drawn(Fixed(7))) == {7}
    assert (min(drawn(Uniform(3, 9))), max(drawn(Uniform(3, 9)))) == (3, 9)
    assert statistics.mean(drawn(Uniform(3, 9))) == pytest.approx(6, rel=0.02)
    lengths = drawn(LogNormal(200, 0.5))
    assert statistics.median(lengths) == pytest.approx(200, rel=0.05)
    low, *_, high = statistics.quantiles(lengths, n=100)
    assert high / low == pytest.approx(2.718 ** (2 * 0.5 * 2.326), rel=0.15)
    assert min(drawn(LogNormal(1, 3))) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "x", "1.5", "poisson(3, 4)"),
        *("uniform(9, 3)", "uniform(1)", "uniform(0, 3)", "uniform(1, 2, 3)"),
        *("lognormal(0, 1)", "lognormal(5, -1)"),
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"length|uniform|lognormal"):
        parse(text)
