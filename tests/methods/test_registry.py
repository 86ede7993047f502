"""Methods are found by name, those of other packages by their entry points."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from tamis.errors import PlanError
from tamis.methods import base, registry
from tamis.methods.registry import GROUP, method_class, methods

OTHERS = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from tamis.methods.base import Evict, budget_param

@dataclass(frozen=True)
class Oldest(Evict):
    '''Keeps the first tokens.'''
    paper: ClassVar[str] = "none"
    budget: int | float = budget_param(0.5)
    def scores(self, view):
        return -view.positions.float()

@dataclass(frozen=True)
class SnapKV(Oldest):
    '''A name that is taken.'''

@dataclass(frozen=True)
class Unfinished(Evict):
    paper: ClassVar[str] = "none"
    budget: int | float = budget_param(0.5)

class Plain(Oldest):
    '''Not a dataclass of its own.'''

@dataclass(frozen=True)
class Nameless(Evict):
    budget: int | float = budget_param(0.5)
    def scores(self, view):
        return -view.positions.float()

number = 3
"""

Found = Callable[[str], dict[str, type[base.Method]]]


@pytest.fixture
def with_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """`with_entry("module:Class")` is what is registered beside an installed package's entry."""
    name = f"others_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OTHERS)
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)

    def register(symbol: str) -> dict[str, type[base.Method]]:
        (info / "entry_points.txt").write_text(f"[{GROUP}]\nmine = {name}:{symbol}\n")
        importlib.invalidate_caches()
        return registry.methods.__wrapped__()

    return register


@pytest.mark.parametrize("name", methods())
def test_every_method_is_a_documented_value_under_its_own_name(name: str) -> None:
    kind = methods()[name]

    assert kind.method_name() == name
    assert is_dataclass(kind())
    assert kind() == kind()
    assert kind.__doc__
    assert "arXiv:" in kind.paper
    assert issubclass(kind, getattr(base, kind.stage.capitalize()))


def test_methods_come_in_the_order_of_the_stages() -> None:
    stages = [base.STAGES.index(kind.stage) for kind in methods().values()]

    assert stages == sorted(stages)


def test_every_parameter_is_explained() -> None:
    for kind in methods().values():
        for field in fields(kind):
            assert field.metadata["help"], f"{kind.__name__}.{field.name}"


def test_names_are_found_in_any_case() -> None:
    assert method_class("SnapKV") is method_class("snapkv") is methods()["snapkv"]


def test_an_installed_packages_method_stands_beside_the_others(with_entry: Found) -> None:
    found = with_entry("Oldest")

    assert set(found) == {*methods(), "oldest"}
    assert found["oldest"](budget=0.25).budget == 0.25
    assert found["oldest"].stage == "evict"


@pytest.mark.parametrize(
    ("symbol", "reason"),
    [
        ("number", "is not a method class; derive it from a stage's class"),
        ("missing", "cannot be loaded"),
        ("SnapKV", "registers the method 'snapkv' a second time"),
        ("Unfinished", "does not define scores"),
        ("Plain", r"is not a dataclass; put @dataclass\(frozen=True\) before it"),
        ("Nameless", "names no paper"),
    ],
)
def test_what_is_no_method_is_refused_by_name(with_entry: Found, symbol: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason) as refused:
        with_entry(symbol)
    assert f":{symbol}" in str(refused.value)
