"""`tamis methods` lists what plans are made of, and shows one method whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields

import pytest
import typer
from typer.testing import Result

from tamis.cli.app import app
from tamis.errors import PlanError
from tamis.methods.base import STAGES
from tamis.methods.registry import methods
from tamis.plan import Plan
from tests.cli.conftest import error_of

Tamis = Callable[..., Result]
EVERY = pytest.mark.parametrize("name", methods())


def test_the_list_has_every_method_under_its_stage(tamis: Tamis) -> None:
    stage, found = "", []
    for line in tamis("methods").stdout.splitlines():
        if title := re.match(r"(\w+): \w", line):
            stage = title[1]
        if method := re.match(r"  (\w+)\(", line):
            found.append((stage, method[1]))

    assert found == [(kind.stage, name) for name, kind in methods().items()]


def test_the_list_shows_parameters_with_defaults_and_paper(tamis: Tamis) -> None:
    lines = tamis("methods").stdout.splitlines()
    row = lines.index("  snapkv(budget=1024, window=32, kernel=7, pooling='max')")

    assert lines[row + 1].strip() == methods()["snapkv"].paper


def test_each_line_of_the_list_is_a_plan_of_defaults(tamis: Tamis) -> None:
    terms = re.findall(r"^  (\w+\(.*\))$", tamis("methods").stdout, re.MULTILINE)

    assert len(terms) == len(methods())
    for term, kind in zip(terms, methods().values(), strict=True):
        rest = " + snapkv()" if kind.stage == "budget" else ""
        assert kind() in Plan.parse(term + rest).methods


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_listed_alone(tamis: Tamis, stage: str) -> None:
    report = json.loads(tamis("methods", "--stage", stage, "--json").stdout)

    assert list(report) == [name for name, kind in methods().items() if kind.stage == stage]
    assert {one["stage"] for one in report.values()} <= {stage}


@EVERY
def test_a_method_is_shown_whole(tamis: Tamis, name: str) -> None:
    text = tamis("methods", name).stdout
    report = json.loads(tamis("methods", name, "--json").stdout)
    kind = methods()[name]

    for line in (kind.__doc__ or "").splitlines():
        assert line.strip() in text
    assert f"{name}, stage {kind.stage}" in text
    assert kind.paper in text
    declared = {field.name: field for field in fields(kind)}
    assert [one["name"] for one in report["parameters"]] == list(declared)
    for one in report["parameters"]:
        assert f"  {one['name']}={declared[one['name']].default!r}, " in text
        assert one["help"] in text
    for other, reason in report["conflicts"].items():
        assert re.search(rf"^  .*\b{other}\b.*: {re.escape(reason)}$", text, re.MULTILINE)


@EVERY
def test_it_names_just_the_methods_that_plans_refuse(tamis: Tamis, name: str) -> None:
    conflicts = json.loads(tamis("methods", name, "--json").stdout)["conflicts"]
    assert name not in conflicts
    for other in methods().keys() - {name}:
        pair = (methods()[name](), methods()[other]())
        if other in conflicts:
            with pytest.raises(PlanError, match=re.escape(conflicts[other])):
                Plan(pair).whole()
        elif "budget" not in {method.stage for method in pair}:  # those need an eviction too
            assert set(Plan(pair).whole().methods) == set(pair)


@EVERY
def test_its_example_is_a_plan_with_it(tamis: Tamis, name: str) -> None:
    example = json.loads(tamis("methods", name, "--json").stdout)["example"]

    assert name in [method.method_name() for method in Plan.parse(example).methods]
    assert str(Plan.parse(example)) == example
    assert f'--plan "{example}"' in tamis("methods", name).stdout


def test_ranges_are_said_in_words(tamis: Tamis) -> None:
    assert "bits=2, int, one of 1, 2, 3, 4, 8\n" in tamis("methods", "kivi").stdout
    text = tamis("methods", "H2O").stdout
    assert "budget=0.2, int or float, more than 0, a decimal at most 1.0\n" in text
    assert "heavy=0.5, float, at least 0, at most 1\n" in text
    assert "depends on the prompt's question: yes" in text


def test_unknown_names_are_refused(tamis: Tamis) -> None:
    assert "did you mean 'snapkv'?" in error_of(tamis("methods", "snapvk"))
    assert "the stages are reuse, prefill" in error_of(tamis("methods", "--stage", "evicts"))
    assert "give one of them" in error_of(tamis("methods", "kivi", "--stage", "codec"))


def test_methods_that_are_fitted_name_commands_that_exist(tamis: Tamis) -> None:
    train = typer.main.get_group(app).commands["train"]
    named = set(re.findall(r"tamis train (\w+)", " ".join(k.__doc__ for k in methods().values())))

    assert {"razorattention", "duoattention", "minference"} <= named
    for name in named:
        assert name in train.commands
        assert "Example: tamis train" in tamis("train", name, "--help").stdout
