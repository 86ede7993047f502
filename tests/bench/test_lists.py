"""The lists that the command line takes."""

from __future__ import annotations

import pytest

from tamis.bench.lists import parse_choices, parse_lengths, parse_plans
from tamis.bench.text import length_text, mebibytes, percent, ratio, seconds
from tamis.errors import ConfigError, PlanError


def test_lengths_are_tokens_and_k_is_1024() -> None:
    assert parse_lengths("4k, 1K,600,600") == [600, 1024, 4096]


@pytest.mark.parametrize("text", ["4m", "-1", "1.5k", "0", "k", "1k 2k"])
def test_what_is_no_length_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{text!r} is no length in tokens"):
        parse_lengths(text)


def test_plans_go_by_their_own_names_once() -> None:
    assert list(parse_plans(["dense; Dense ;", "dense"])) == ["dense"]
    with pytest.raises(PlanError, match="nonsense"):
        parse_plans(["dense; nonsense"])
    with pytest.raises(ConfigError, match="there is no plan"):
        parse_plans([" ; "])


def test_choices_keep_their_order_and_name_what_is_unknown() -> None:
    assert parse_choices("b, a", ("a", "b", "c"), "--x") == ("a", "b")
    with pytest.raises(ConfigError, match=r"--x has 'd'; it takes one or more of a, b"):
        parse_choices("a,d", ("a", "b"), "--x")
    with pytest.raises(ConfigError, match="--x has nothing"):
        parse_choices("", ("a", "b"), "--x")


def test_numbers_are_written_to_about_three_digits() -> None:
    assert [seconds(s) for s in (0.00123, 0.0456, 0.789, 0.99951, 12.3, 456)] == [
        "1.23 ms",
        "45.6 ms",
        "789 ms",
        "1.00 s",
        "12.3 s",
        "456 s",
    ]
    assert [mebibytes(n * 2**20) for n in (0.5, 2, 64, 2048)] == ["0.500", "2.00", "64.0", "2,048"]
    assert [length_text(n) for n in (1024, 6000, 16384, None)] == [
        "1k",
        "6000",
        "16k",
        "as published",
    ]
    assert (percent(0.375), percent(None), ratio(0.5)) == ("37.5", "–", "0.50×")  # noqa: RUF001
