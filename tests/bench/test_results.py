"""Result files outlive kills, and never pass for what they are not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tamis.bench.record import Record
from tamis.bench.results import Answer, ResultFile, Timing
from tamis.errors import ConfigError
from tests.bench.conftest import SETTINGS, answer, timing


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [answer(sample=i, expected=["Zürich", "東京"], length=None) for i in range(3)]
    with ResultFile(tmp_path / "deep" / "answers.jsonl", Answer) as file:
        for row in rows:
            file.append(row)

    with ResultFile(tmp_path / "deep" / "answers.jsonl", Answer) as file:
        assert file.rows == rows


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "timings.jsonl", Timing)
    file.append(timing())
    assert json.loads(file.path.read_text())["plan"] == "dense"
    file.close()


@pytest.mark.parametrize("cut", [1, 2, 40, 10_000])
def test_a_line_that_a_kill_left_half_written_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    with ResultFile(path, Answer) as file:
        file.append(answer(sample=0))
        whole = path.read_bytes()
        file.append(answer(sample=1, answer="é" * 20))
    content = path.read_bytes()
    path.write_bytes(content[: max(len(whole), len(content) - cut)])

    with ResultFile(path, Answer) as file:
        assert [row.sample for row in file.rows] == [0]
        file.append(answer(sample=2))

    assert [json.loads(line)["sample"] for line in path.read_text().splitlines()] == [0, 2]


@pytest.mark.parametrize(
    "line",
    ["{broken", "[1, 2]", json.dumps({"plan": "dense"}), json.dumps(asdict(timing()))],
    ids=["not JSON", "no object", "fields missing", "another kind of row"],
)
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(asdict(answer())) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=r"answers\.jsonl, line 2: this is no answer"):
        ResultFile(path, Answer)


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write results to .*file/answers\.jsonl"):
        ResultFile(tmp_path / "file" / "answers.jsonl", Answer)


def test_a_folder_keeps_results_of_one_setting_only(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "run.json"
    record.keep(path)
    record.keep(path)
    other = replace(record, command="again", date="later")
    other.keep(path)
    assert json.loads(path.read_text())["command"] == "again"

    changed = replace(record, settings=replace(SETTINGS, seed=1))
    with pytest.raises(ConfigError, match="were made with seed 0, not 1; give another --out"):
        changed.keep(path)


def test_a_record_that_is_none_is_named(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "run.json"
    path.write_text("no record")
    with pytest.raises(ConfigError, match=r"run\.json is not a record of tamis bench"):
        record.keep(path)
