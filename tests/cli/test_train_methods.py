"""`tamis train METHOD` fits what a method needs, puts it where plans look, and shows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from tamis.cli import train_methods
from tamis.errors import ConfigError
from tamis.train.methods import duoattention

COMMANDS = ("razorattention", "duoattention", "minference")
Fit = Callable[..., Result]


@pytest.fixture
def fit() -> Fit:
    """`fit("razorattention", "--model", ...)` is the result of that command alone."""
    app = typer.Typer()
    for name in COMMANDS:
        app.command(name)(getattr(train_methods, name))

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture(scope="module")
def model(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's model: files are written beside it."""
    return Path(shutil.copytree(endless, tmp_path_factory.mktemp("fitted") / "model"))


def test_razorattention_writes_scores_of_every_head(fit: Fit, model: Path) -> None:
    result = fit("razorattention", "-m", model, "--tokens", 20, "--repeats", 3, "--dtype", "fp32")

    assert result.exit_code == 0, result.output
    file = model / "tamis" / "razorattention.safetensors"
    assert f"wrote {file}" in result.stdout
    scores = load_file(file)
    assert set(scores) == {"echo", "induction"}
    assert f"layer   0  echo       {scores['echo'][0, 0]:.4f}" in result.stdout
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"tokens": "20", "repeats": "3", "seed": "0"}


@pytest.mark.slow
def test_duoattention_writes_gates_where_it_is_told(fit: Fit, model: Path, tmp_path: Path) -> None:
    short = ("--length", 700, "--steps", 1, "--recent", 16, "--dtype", "fp32")

    result = fit("duoattention", "-m", model, "--out", tmp_path / "new", *short)

    assert result.exit_code == 0, result.output
    assert "step     1  100%" in result.stderr
    gates = load_file(tmp_path / "new" / "duoattention.safetensors")["gates"]
    assert ((gates > 0.9) & (gates < 1)).all()


def test_an_interrupted_fit_is_saved_and_says_so(
    fit: Fit, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = duoattention.Gates(torch.ones(32, 8), steps=7, finished=False)
    monkeypatch.setattr(duoattention, "fit", lambda *arguments, **options: half)

    result = fit("duoattention", "-m", model, "--out", tmp_path, "--minutes", 1)

    assert result.exit_code == 130
    assert "interrupted after 7 steps" in result.stderr
    assert (tmp_path / "duoattention.safetensors").is_file()


@pytest.mark.slow
def test_minference_writes_a_pattern_for_every_head(fit: Fit, model: Path) -> None:
    options = ("--length", 700, "--keys", 150, "--dtype", "fp32")

    result = fit("minference", "-m", model, *options)

    assert result.exit_code == 0, result.output
    found = load_file(model / "tamis" / "minference.safetensors")
    assert found["size"].shape == (*found["kind"].shape, 2)
    heads = [line for line in result.stdout.splitlines() if "  head " in line]
    assert len(heads) == found["kind"].numel()
    assert "error 0." in heads[0]


def test_what_cannot_be_done_is_explained(fit: Fit, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    wrong = {
        "give --out DIR": ("razorattention", "-m", "some/model"),
        "both given": ("duoattention", "-m", model, "--steps", 1, "--minutes", 1),
        "cannot write into": ("razorattention", "-m", model, "--out", tmp_path / "file" / "x"),
    }
    for sentence, arguments in wrong.items():
        error = fit(*arguments).exception
        assert isinstance(error, ConfigError), arguments
        assert sentence in str(error)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(fit: Fit, name: str) -> None:
    app = typer.Typer()
    app.command(name)(getattr(train_methods, name))
    for option in typer.main.get_command(app).params:
        assert option.help or option.name in {"install_completion", "show_completion"}
    assert "Example: tamis train" in fit(name, "--help").stdout
