"""Rows say of a measurement what it is: a ratio, a share of the limit, a target met or missed."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from report import Row, Target, number, save, table
from tamis.cli.machine import Rates, this_machine
from timing import Spread, in_turns


def row(ours: float, theirs: float | None = None, **others) -> Row:
    other = Spread.of([theirs]) if theirs is not None else None
    return Row("a row", "ms", Spread.of([ours]), other, **others)


def test_runs_take_turns():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert in_turns(runs, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert order == list("ababab")


def test_a_spread_is_the_median_between_the_extremes():
    assert Spread.of([9.0, 1.0, 2.0]) == Spread(2.0, 1.0, 9.0, 3)


def test_the_ratio_is_ours_over_theirs():
    assert row(1.0, 4.0).ratio == 0.25
    assert row(1.0).ratio is None


@pytest.mark.parametrize(
    ("ours", "higher_is_better", "share"), [(20.0, False, 0.5), (5.0, True, 0.5)]
)
def test_the_share_of_the_limit_is_a_speed_whatever_the_unit(ours, higher_is_better, share):
    assert row(ours, limit=10.0, higher_is_better=higher_is_better).of_limit == share


@pytest.mark.parametrize(
    ("target", "ours", "theirs", "met"),
    [
        (Target(0.3), 3.0, 10.0, True),
        (Target(0.3), 3.1, 10.0, False),
        (Target(4, at_least=True), 4.0, 1.0, True),
        (Target(4, at_least=True), 3.9, 1.0, False),
        (Target(10, of_ratio=False), 10.0, None, True),
        (Target(10, of_ratio=False), 10.1, None, False),
        (None, 1.0, None, None),
    ],
)
def test_a_target_is_met_up_to_its_bound(target, ours, theirs, met):
    assert row(ours, theirs, target=target).met is met


def test_the_table_says_pass_and_miss():
    out = io.StringIO()
    rows = [row(1.0, 10.0, target=Target(0.3)), row(5.0, 10.0, target=Target(0.3))]
    Console(file=out, width=120).print(table(rows, "another"))
    passed, missed = [line for line in out.getvalue().splitlines() if "a row" in line]
    assert "0.10x" in passed
    assert "pass" in passed
    assert "0.50x" in missed
    assert "MISS" in missed


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.012345, "0.0123"), (1.234, "1.23"), (12345.6, "12,346")]
)
def test_numbers_have_three_digits_or_their_whole_part(value, text):
    assert number(value) == text


def test_the_file_holds_rows_machine_and_rates(tmp_path):
    path = tmp_path / "new" / "results.json"
    rows = [row(1.0, 4.0, target=Target(0.3), limit=0.5)]
    save(path, "name", this_machine(), Rates(1.0, 2.0, 3.0), {"threads": 2}, rows)
    record = json.loads(path.read_text())
    assert record["rows"][0]["ratio"] == 0.25
    assert record["rows"][0]["met"] is True
    assert record["rows"][0]["ours"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert record["rates"]["matmul_bf16_flops"] == 3.0
    assert record["machine"]["cores"] >= 1
    assert {"python", "tamis", "torch", "transformers"} <= record["versions"].keys()
    assert record["settings"] == {"threads": 2}
