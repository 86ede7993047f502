"""Files in the published formats: what they become, and what is said of broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tamis.bench.exercise import Exercise
from tamis.bench.published.infinitebench import TASKS, load_infinitebench
from tamis.bench.published.longbench import DATASETS, load_longbench
from tamis.bench.published.ruler import load_ruler
from tamis.errors import ConfigError

RULER = {"index": 0, "input": "Some text. What is it?", "outputs": ["123", "456"], "length": 4096}
LONGBENCH = {
    "input": "Who {wrote} it?",
    "context": "Ada {context} wrote it.",
    "answers": ["Ada", "Ada Lovelace"],
    "length": 900,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "x",
}
INFINITE = {
    "id": 0,
    "context": "A long book.",
    "input": "Who did it?",
    "answer": ["the butler"],
    "options": ["the cook", "the butler", "the maid", "nobody"],
}

Loader = Callable[[Path], list[Exercise]]


def write(path: Path, *values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8"
    )
    return path


def without(values: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != field}


def test_a_ruler_line_is_its_input_and_all_of_its_outputs_count(tmp_path: Path) -> None:
    (one,) = load_ruler(write(tmp_path / "niah_multivalue" / "validation.jsonl", RULER))
    assert one.task == "ruler/niah_multivalue"
    assert (one.text, one.expected, one.max_tokens) == (RULER["input"], ("123", "456"), 128)
    assert one.score("123 and 9") == 0.5


def test_a_ruler_line_may_carry_the_beginning_of_its_answer(tmp_path: Path) -> None:
    line = RULER | {"answer_prefix": " The answer is"}
    (one,) = load_ruler(write(tmp_path / "vt.jsonl", line))
    assert one.task == "ruler/vt"
    assert one.text == "Some text. What is it? The answer is"
    assert one.max_tokens == 30


def test_any_output_will_do_for_rulers_question_answering(tmp_path: Path) -> None:
    (one,) = load_ruler(write(tmp_path / "qa_1.jsonl", RULER))
    assert one.score("456") == 1
    assert one.max_tokens == 32


def test_a_longbench_line_is_asked_in_its_family_and_the_best_reference_counts(
    tmp_path: Path,
) -> None:
    (one,) = load_longbench(write(tmp_path / "data.jsonl", LONGBENCH))
    assert one.task == "longbench/hotpotqa"
    assert "Ada {context} wrote it." in one.text  # braces of the data are left alone
    assert one.text.endswith("Question: Who {wrote} it?\nAnswer:")
    assert one.score("Lovelace, Ada") == 1
    assert one.max_tokens == 32


@pytest.mark.parametrize("name", DATASETS)
def test_every_longbench_dataset_scores_a_right_answer_as_right(tmp_path: Path, name: str) -> None:
    right = {
        "passage_retrieval_en": "Paragraph 12",
        "passage_retrieval_zh": "段落12",
        "passage_count": "12",
    }.get(name, "return 12")
    line = LONGBENCH | {"dataset": name, "answers": [right], "all_classes": ["return 12", "other"]}
    (one,) = load_longbench(write(tmp_path / "data.jsonl", line))
    assert one.score(right) == 1
    assert one.score("?!") == 0
    assert line["context"] in one.text


def test_only_the_first_line_of_a_few_shot_answer_counts(tmp_path: Path) -> None:
    line = LONGBENCH | {"dataset": "trec", "answers": ["Food"], "all_classes": ["Food", "Date"]}
    (one,) = load_longbench(write(tmp_path / "data.jsonl", line))
    assert one.score("\nFood\nQuestion: When? Type: Date") == 1
    assert one.completion


def test_an_extended_longbench_dataset_is_judged_as_the_plain_one(tmp_path: Path) -> None:
    (one,) = load_longbench(write(tmp_path / "data.jsonl", LONGBENCH | {"dataset": "qasper_e"}))
    assert one.task == "longbench/qasper_e"
    assert one.max_tokens == 128


def test_an_infinitebench_choice_shows_its_options_and_wants_the_letter(tmp_path: Path) -> None:
    (one,) = load_infinitebench(write(tmp_path / "longbook_choice_eng.jsonl", INFINITE))
    assert one.task == "infinitebench/longbook_choice_eng"
    assert "A. the cook\nB. the butler\nC. the maid\nD. nobody" in one.text
    assert (one.score("B"), one.score("C")) == (1, 0)


@pytest.mark.parametrize("name", TASKS)
def test_every_infinitebench_task_scores_a_right_answer_as_right(tmp_path: Path, name: str) -> None:
    numbers = ("passkey", "number_string", "math_find", "math_calc", "code_run")
    right: Any = [71432] if name in numbers else ["butler"]
    line = INFINITE | {"answer": right, "options": ["cook", "butler"]}
    (one,) = load_infinitebench(write(tmp_path / f"{name}.jsonl", line))
    assert one.score(str(right[0])) == 1
    assert one.score("?! 5") == 0


BROKEN: list[tuple[Loader, str, dict[str, Any], str]] = [
    (load_ruler, "vt.jsonl", RULER, "input"),
    (load_ruler, "vt.jsonl", RULER, "outputs"),
    (load_longbench, "data.jsonl", LONGBENCH, "input"),
    (load_longbench, "data.jsonl", LONGBENCH, "context"),
    (load_longbench, "data.jsonl", LONGBENCH, "answers"),
    (load_longbench, "data.jsonl", LONGBENCH, "dataset"),
    (load_infinitebench, "longbook_choice_eng.jsonl", INFINITE, "input"),
    (load_infinitebench, "longbook_choice_eng.jsonl", INFINITE, "context"),
    (load_infinitebench, "longbook_choice_eng.jsonl", INFINITE, "answer"),
    (load_infinitebench, "longbook_choice_eng.jsonl", INFINITE, "options"),
]


@pytest.mark.parametrize(("load", "name", "line", "field"), BROKEN)
def test_a_missing_field_is_named_with_file_and_line(
    tmp_path: Path, load: Loader, name: str, line: dict[str, Any], field: str
) -> None:
    path = write(tmp_path / name, line, line, without(line, field))
    with pytest.raises(ConfigError) as error:
        load(path)
    assert f"{path}, line 3: the field {field!r} is missing" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "field 'answers' .* must be a list of at least one text, not \\[\\]"),
        ({"answers": [None]}, "field 'answers' .* must be a list"),
        ({"context": ["a"]}, "field 'context' .* must be text, not"),
        ({"dataset": "other"}, "line 1: there is no LongBench dataset 'other'"),
        ({"dataset": "trec"}, "field 'all_classes' .* must be a list"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_longbench(write(tmp_path / "data.jsonl", LONGBENCH | change))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", LONGBENCH)
    path.write_text(path.read_text() + "\n\n{'input': 1}\n")
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 4: not JSON"):
        load_longbench(path)
    path.write_text("[]\n")
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 1: not a JSON object"):
        load_longbench(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the RULER file .*missing\.jsonl"):
        load_ruler(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"empty\.jsonl has no lines"):
        load_ruler(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_ruler(tmp_path / "latin.jsonl")


def test_an_infinitebench_file_is_named_after_its_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.jsonl says no InfiniteBench task; .*passkey"):
        load_infinitebench(write(tmp_path / "other.jsonl", INFINITE))


def test_an_answer_that_is_no_option_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "code_debug.jsonl", INFINITE | {"answer": "the dog"})
    with pytest.raises(ConfigError, match="line 1: the answer 'the dog' is none of"):
        load_infinitebench(path)
