"""`tamis methods`: which methods a plan can be made of, and everything about one of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamis.cli import options
from tamis.errors import PlanError

if TYPE_CHECKING:
    from tamis.methods.base import Method

_PARTNERS = ("snapkv(budget=0.1)", "kivi()")
"""Methods that examples are composed with, the first that fits."""


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="The name of one method, to show it whole."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Only the methods of this stage.")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the methods that plans are made of: stage, parameters with defaults, paper.

    With a NAME, show that method whole: what it does, its parameters and their ranges, and what it
    cannot be composed with.

    Example: tamis methods snapkv
    """
    from tamis.methods.registry import method_class

    if name is not None and stage is not None:
        raise PlanError(f"the method {name} and --stage {stage} were both given; give one of them")
    if name is None:
        kinds = _of_stage(stage)
        report = {kind.method_name(): describe(kind) for kind in kinds}
        lines: Iterable[str] = _list_lines(report)
    else:
        kind = method_class(name)
        report = describe(kind) | {
            "description": inspect.cleandoc(kind.__doc__ or ""),
            "conflicts": conflicts(kind),
            "example": example(kind),
        }
        lines = _method_lines(report)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        typer.echo("\n".join(lines))


def describe(kind: type[Method]) -> dict[str, Any]:
    """A method's declaration: name, stage, paper, parameters with their types, defaults and ranges.

    A parameter's `type` is "int", "float", "int | float", "bool" or "str"; limits it does not have
    are None.
    """
    return {
        "name": kind.method_name(),
        "stage": kind.stage,
        "paper": kind.paper,
        "query_dependent": kind.query_dependent,
        "parameters": [_parameter(field) for field in fields(kind)],
    }


def conflicts(kind: type[Method]) -> dict[str, str]:
    """The others that a method cannot be composed with, both with default parameters, and why."""
    from tamis.methods.registry import methods as registered
    from tamis.plan import conflict

    found = {
        name: conflict(kind(), other()) for name, other in registered().items() if other is not kind
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def example(kind: type[Method]) -> str:
    """A plan with the method, composed with another where that is possible."""
    from tamis.plan import Plan

    for partner in _PARTNERS:
        if Plan.parse(partner).methods[0].stage == kind.stage:
            continue
        try:
            return str(Plan.parse(kind() + partner))
        except PlanError:
            continue
    return str(kind())


def _of_stage(stage: str | None) -> list[type[Method]]:
    """The methods of one stage, or all.

    Raises:
        PlanError: there is no such stage.
    """
    from tamis.methods.base import STAGES
    from tamis.methods.registry import methods as registered

    if stage is not None and stage not in STAGES:
        raise PlanError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
    return [kind for kind in registered().values() if stage in (None, kind.stage)]


def _parameter(field: Any) -> dict[str, Any]:
    annotation = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    default = None if field.default is MISSING else field.default
    limits = {name: field.metadata.get(name) for name in ("minimum", "maximum", "above", "choices")}
    meaning = field.metadata.get("help", "")
    return {"name": field.name, "type": annotation, "default": default, **limits, "help": meaning}


def _list_lines(report: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Every method under its stage: its parameters as a plan writes them, then its paper."""
    from tamis.methods.registry import methods as registered

    stage = None
    for one in report.values():
        if one["stage"] != stage:
            stage = one["stage"]
            title = f"{stage}: {_stage_summary(registered()[one['name']])}"
            yield typer.style(title, bold=True)
        given = ", ".join(f"{p['name']}={p['default']!r}" for p in one["parameters"])
        yield f"  {one['name']}({given})"
        yield f"      {one['paper']}"
    yield "\n`tamis methods NAME` shows one whole."


def _stage_summary(kind: type[Method]) -> str:
    """The first sentence about the stage of a method, from the stage's own class."""
    base = next(cls for cls in reversed(kind.__mro__) if "stage" in vars(cls))
    return " ".join(inspect.cleandoc(base.__doc__ or "").split()).split(". ")[0].rstrip(".")


def _method_lines(report: dict[str, Any]) -> Iterator[str]:
    """Everything about one method."""
    yield typer.style(f"{report['name']}, stage {report['stage']}", bold=True)
    yield f"{report['paper']}\n"
    yield f"{report['description']}\n"
    yield typer.style("parameters" if report["parameters"] else "no parameters", bold=True)
    for one in report["parameters"]:
        kind = one["type"].replace(" | ", " or ")
        yield "  " + ", ".join((f"{one['name']}={one['default']!r}", kind, *_limits(one)))
        yield f"      {one['help']}"
    answer = "yes, so its KV serves no other question" if report["query_dependent"] else "no"
    yield f"\ndepends on the prompt's question: {answer}\n"
    yield typer.style("with default parameters, cannot be composed with", bold=True)
    for reason in dict.fromkeys(report["conflicts"].values()):
        names = [name for name, its_own in report["conflicts"].items() if its_own == reason]
        yield f"  {', '.join(names)}: {reason}"
    yield typer.style("\nexample", bold=True)
    yield f'  tamis run --plan "{report["example"]}"'


def _limits(parameter: dict[str, Any]) -> Iterator[str]:
    """The range of a parameter, in words."""
    if parameter["choices"] is not None:
        yield f"one of {', '.join(map(repr, parameter['choices']))}"
    for name, words in (("above", "more than"), ("minimum", "at least"), ("maximum", "at most")):
        if parameter[name] is not None:
            yield f"{words} {parameter[name]}"
    if parameter["type"] == "int | float":
        yield "a decimal at most 1.0"
