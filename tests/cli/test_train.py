"""`tamis train` makes a model from nothing, goes on with it, and says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import Result

from tamis import LLM
from tamis.bench.tasks.corpus import files_of
from tamis.bench.tasks.samples import Suite
from tamis.cli.app import app
from tamis.train import evaluate, recipe, reference
from tamis.train.data import Blend
from tests.cli.conftest import error_of

Tamis = Callable[..., Result]
TRAIN = typer.main.get_group(app).commands["train"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with less of everything: text, parameters, lengths, samples, and no compiler."""

    def tiny_recipe(**budget: object) -> recipe.Recipe:
        shape = recipe.Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, feed_forward=48)
        stage = recipe.Stage(96, 2, 1.0, Blend({"needle": 1.0, "text": 1.0}, (0.5, 0.9)))
        return recipe.Recipe(shape, (stage,), **budget)

    files = files_of("held_out")[:6]
    train = partial(reference.train, files=files, compiled=False)
    monkeypatch.setattr(recipe, "cpu_recipe", tiny_recipe)
    monkeypatch.setattr(reference, "train", train)
    monkeypatch.setattr(evaluate, "card_suites", lambda quick: [Suite("single", 256, 2)])
    monkeypatch.setattr(evaluate, "_WINDOWS", ((128, 2),))


@pytest.mark.slow
def test_it_trains_exports_and_measures_and_goes_on(
    tamis: Tamis, small: None, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "model"
    places = ("--run", run, "--out", out)
    options = ("--device", "cpu", "--threads", 1)

    first = tamis("train", "reference", *places, *options, "--steps", 2)
    second = tamis("train", "reference", *places, *options, "--steps", 3)

    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert "goes on at step 2" in second.stdout
    assert json.loads((out / "training.json").read_text())["training"]["step"] == 3
    assert f"wrote {out}\n" in second.stdout
    card = (out / "README.md").read_text()
    assert "| single |" in card
    assert (out / "curves.png").is_file()
    (output,) = LLM(out, dtype="fp32", kv_memory="16MiB").generate("VAR AB = 1\n", progress=False)
    assert output.token_ids

    (out / "evaluation.json").unlink()
    again = tamis("train", "export", *places)
    assert again.exit_code == 0, again.output
    assert "| single |" not in (out / "README.md").read_text()
    assert tamis("train", "evaluate", "--model", out, "--quick").exit_code == 0
    assert (out / "README.md").read_text() == card


def test_without_matplotlib_it_says_that_curves_are_not_drawn(
    tamis: Tamis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    result = tamis("train", "export", "--run", tmp_path)

    assert "pip install 'tamis[bench]'" in result.stderr


@pytest.mark.parametrize("name", ["reference", "export", "evaluate"])
def test_every_option_is_listed_and_explained(tamis: Tamis, name: str) -> None:
    result = tamis("train", name, "--help")

    assert f" {name} " in tamis("train", "--help").stdout
    for option in TRAIN.commands[name].params:
        assert option.help, f"{option.name} is not explained"
        for flag in option.opts:
            assert flag in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("reference", "--minutes", "1", "--steps", "1"), "--minutes and --steps were both given"),
        (("reference", "--device", "abacus"), "'abacus' is not available here"),
        (("export", "--run", "no/such/run"), "no/such/run holds no checkpoint.pt"),
        (("evaluate", "--model", "no/such/model"), "no/such/model has no config.json"),
    ],
)
def test_what_cannot_be_done_is_explained(
    tamis: Tamis, arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in error_of(tamis("train", *arguments))


def test_a_folder_that_cannot_be_written_is_named(
    tamis: Tamis, small: None, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")

    run = ("train", "reference", "--run", file / "run", "--device", "cpu", "--steps", 1)

    assert f"cannot write {file / 'run'}" in error_of(tamis(*run))
