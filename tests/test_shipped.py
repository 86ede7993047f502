"""The model that ships with tamis is found by its name, and is what commands run by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tamis import LLM, shipped
from tamis.cli.app import app
from tamis.errors import ModelError
from tests.cli.conftest import error_of

Ships = Callable[[Path], Path]


@pytest.fixture
def llama(tiny_dir: Callable[[str], Path]) -> Path:
    return tiny_dir("llama")


def test_it_is_found_by_name(ships: Ships, llama: Path) -> None:
    folder = ships(llama)

    assert shipped.find() == folder
    assert shipped.locate("reference") == str(folder)
    llm = LLM("reference", dtype="fp32", kv_memory="16MiB")
    assert llm.model.name == "reference"
    assert llm.generate("x", progress=False)[0].token_ids


def test_other_models_are_what_they_were(ships: Ships, llama: Path) -> None:
    ships(llama)

    assert shipped.locate("org/reference") == "org/reference"
    assert shipped.locate(Path("./reference")) == "reference"  # a directory of that name


def test_without_it_its_name_is_an_error_and_no_hub_is_asked(nothing_ships: None) -> None:
    assert shipped.find() is None
    with pytest.raises(ModelError, match="'reference' is not part of this copy"):
        LLM("reference")


def test_a_folder_without_a_model_is_not_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "reference").mkdir()
    monkeypatch.setattr(shipped, "PLACES", (tmp_path,))

    assert shipped.find() is None


def test_run_and_info_take_it_by_default_and_say_so(ships: Ships, llama: Path) -> None:
    ships(llama)
    options = ["--dtype", "fp32", "--kv-memory", "16MiB", "--json"]
    run = CliRunner().invoke(app, ["run", "--prompt", "x", "--max-tokens", "2", *options])
    info = CliRunner().invoke(app, ["info", *options])

    assert len(json.loads(run.stdout)["token_ids"]) == 2
    assert json.loads(info.stdout)["model"]["name"] == "reference"
    for result in (run, info):
        assert "model: reference, the small one that ships with tamis" in result.stderr


@pytest.mark.parametrize("command", [["run", "--prompt", "x"], ["bench"]])
def test_without_it_a_model_must_be_given(nothing_ships: None, command: list[str]) -> None:
    result = CliRunner().invoke(app, command)

    assert "no model is given, and none ships with this copy" in error_of(result)
