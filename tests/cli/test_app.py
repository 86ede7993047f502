"""The command line as a whole: help, version, and how every command ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import Result

import tamis as package
from tamis.cli.app import app
from tamis.errors import RequestError

Tamis = Callable[..., Result]
COMMANDS = {command.name: command for command in typer.main.get_group(app).commands.values()}


def test_without_arguments_it_prints_help(tamis: Tamis) -> None:
    bare, asked = tamis(), tamis("--help")

    assert bare.exit_code == asked.exit_code == 0
    assert "Usage:" in bare.stdout
    assert bare.stdout.strip() == asked.stdout.strip()


def test_help_names_every_command(tamis: Tamis) -> None:
    assert {"run", "info", "demo"} <= set(COMMANDS)
    for name in COMMANDS:
        assert f" {name} " in tamis("--help").stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_listed_and_explained(tamis: Tamis, name: str) -> None:
    result = tamis(name, "--help")

    assert result.exit_code == 0
    for option in COMMANDS[name].params:
        assert option.help, f"{option.name} is not explained"
        for flag in (*option.opts, *option.secondary_opts):
            assert flag in result.stdout


def test_version(tamis: Tamis) -> None:
    assert tamis("--version").stdout == f"tamis {package.__version__}\n"


def test_an_unknown_option_is_refused(tamis: Tamis) -> None:
    result = tamis("info", "--nonsense")

    assert result.exit_code == 2
    assert "--nonsense" in result.stderr


def test_debug_shows_where_an_error_was_raised(tamis: Tamis, llama: Path) -> None:
    plain = tamis("run", "--model", llama)
    debugging = tamis("run", "--model", llama, "--debug")

    assert plain.exit_code == 2
    assert isinstance(debugging.exception, RequestError)
