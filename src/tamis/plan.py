"""Plans: which methods act on a request's KV cache.

A plan is a composition of methods, at most one per stage, written the same way in Python and as a
string: `SnapKV(budget=0.1) + KIVI(bits=2)` and `"snapkv(budget=0.1) + kivi(bits=2)"`. The empty
plan is `"dense"`: exact attention over every token. A plan that cannot work is refused here, when
it is made or, where a further term could still make it whole, when it is handed over to be used;
never when it runs.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple, TypeVar, cast

from tamis.errors import PlanError
from tamis.methods.base import (
    STAGES,
    Budget,
    Codec,
    Draft,
    Evict,
    Heads,
    Merge,
    Method,
    Place,
    Prefill,
    Reuse,
    Select,
    Share,
    Tokens,
)
from tamis.methods.registry import method_class
from tamis.methods.views import Needs

DENSE = "dense"
"""The empty plan: exact attention."""

_M = TypeVar("_M", bound=Method)


@dataclass(frozen=True)
class Plan:
    """A request's plan.

    Attributes:
        methods: in the order of the stages.
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        """Order the methods, and refuse those that no other method could bring together.

        Raises:
            PlanError: two methods of one stage, or two that cannot be composed.
        """
        ordered = sorted(self.methods, key=lambda method: STAGES.index(method.stage))
        object.__setattr__(self, "methods", tuple(ordered))
        _check_pairs(self.methods, _of(Evict, self.methods))

    @classmethod
    def parse(cls, plan: str | Plan | Method | None) -> Plan:
        """The whole plan that a string names; None and "dense" are exact attention.

        Raises:
            PlanError: the string is not a plan, names an unknown method or parameter, or what it
                names cannot be composed or is not whole.
        """
        return _as_plan(plan).whole()

    def whole(self) -> Plan:
        """This plan, if it can run as it is.

        Terms are added in any order, so that a sum may lack on its way what a later term brings:
        `HeadAdaptive() + KIVI()` before `+ SnapKV()`. It is judged here, when it is to be used.

        Raises:
            PlanError: a method lacks the one it acts on, or cannot be composed with the eviction
                that another brings because the plan names none.
        """
        _check_pairs(self.methods, self.evict)
        if self.budget is not None and self.evict is None:
            raise PlanError(
                f"{self.budget.method_name()} shares a budget out among layers or heads, so the "
                "plan needs a method that evicts, e.g. 'snapkv(budget=0.1)'"
            )
        return self

    def __add__(self, other: Plan | Method | str) -> Plan:
        return Plan(self.methods + _as_plan(other).methods)

    __radd__ = __add__

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods)) or DENSE

    @property
    def dense(self) -> bool:
        """Whether this is exact attention."""
        return not self.methods

    @cached_property
    def needs(self) -> Needs:
        """What the engine must gather for its methods."""
        needs = Needs()
        acting = [*self.methods, *([self.evict] if self.evict is not None else [])]
        for method in acting:
            needs = needs | method.needs()
        return needs

    @property
    def drops(self) -> bool:
        """Whether tokens leave the cache, so that what stays is not simply 0, 1, 2, ..."""
        return bool(self.evict or self.heads or self.tokens)

    @property
    def compresses(self) -> bool:
        """Whether a request takes less memory on the device than all of its tokens would."""
        return self.drops or bool(self.codec or self.share or self.place)

    @property
    def query_dependent(self) -> bool:
        """Whether what stays in the cache depends on the prompt's question."""
        return any(method.query_dependent for method in self.methods)

    @cached_property
    def evict(self) -> Evict | None:
        """The eviction: the plan's own, else the one that its merging or pruning method brings."""
        return _eviction(self.methods)

    @cached_property
    def reuse(self) -> Reuse | None:
        return self._of(Reuse)

    @property
    def without_reuse(self) -> Plan:
        """This plan for a prompt in which nothing is reused."""
        return Plan(tuple(method for method in self.methods if method is not self.reuse))

    @cached_property
    def prefill(self) -> Prefill | None:
        return self._of(Prefill)

    @cached_property
    def tokens(self) -> Tokens | None:
        return self._of(Tokens)

    @cached_property
    def budget(self) -> Budget | None:
        return self._of(Budget)

    @cached_property
    def merge(self) -> Merge | None:
        return self._of(Merge)

    @cached_property
    def heads(self) -> Heads | None:
        return self._of(Heads)

    @cached_property
    def codec(self) -> Codec | None:
        return self._of(Codec)

    @cached_property
    def share(self) -> Share | None:
        return self._of(Share)

    @cached_property
    def select(self) -> Select | None:
        return self._of(Select)

    @cached_property
    def place(self) -> Place | None:
        return self._of(Place)

    @cached_property
    def draft(self) -> Draft | None:
        return self._of(Draft)

    def _of(self, kind: type[_M]) -> _M | None:
        """The plan's method of one stage."""
        return _of(kind, self.methods)


def conflict(first: Method, second: Method) -> str | None:
    """Why a plan of these two methods is impossible, in a clause; None if they compose."""
    one, other = sorted((first, second), key=lambda method: STAGES.index(method.stage))
    return _why_not(one, other, _eviction((one, other)))


def _as_plan(plan: str | Plan | Method | None) -> Plan:
    """The plan that a string names, whole or a part of one."""
    if plan is None:
        return Plan()
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Method):
        return Plan((plan,))
    if not isinstance(plan, str):
        raise PlanError(f"a plan is a string such as 'dense', not {type(plan).__name__}")
    return Plan(tuple(_parse(plan)))


def _check_pairs(methods: Sequence[Method], evict: Evict | None) -> None:
    """Refuse two methods, of some in the order of their stages, that cannot be composed.

    Args:
        evict: the eviction of their plan; None while it may still be given one.
    """
    for first, second in combinations(methods, 2):
        reason = _why_not(first, second, evict)
        if reason is not None:
            raise PlanError(
                f"{first.method_name()} and {second.method_name()} cannot be composed: {reason}"
            )


def _of(kind: type[_M], methods: Sequence[Method]) -> _M | None:
    """The method of one stage."""
    return next((method for method in methods if isinstance(method, kind)), None)


def _eviction(methods: Sequence[Method]) -> Evict | None:
    """The eviction of a plan of these methods."""
    own = _of(Evict, methods)
    if own is not None:
        return own
    brings = _of(Merge, methods) or _of(Tokens, methods)
    return brings.eviction() if brings is not None else None


def _parse(text: str) -> Iterable[Method]:
    """The methods that a string names."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise PlanError(
            f"{text!r} is not a plan; write e.g. 'snapkv(budget=0.1) + kivi(bits=2)'"
        ) from error
    terms: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        terms.append(tree.right)
        tree = tree.left
    terms.append(tree)
    if len(terms) == 1 and isinstance(tree, ast.Name) and tree.id.lower() == DENSE:
        return []
    return [_method(term, text) for term in reversed(terms)]


def _method(term: ast.expr, text: str) -> Method:
    """The method that one term of a plan names: `name` or `name(parameter=value, ...)`."""
    call = term if isinstance(term, ast.Call) else None
    name = call.func if call is not None else term
    if not isinstance(name, ast.Name):
        raise PlanError(f"{ast.unparse(term)!r} in the plan {text!r} is not a method")
    if name.id.lower() == DENSE:
        raise PlanError(f"'dense' is a whole plan and composes with nothing, got {text!r}")
    kind = method_class(name.id)
    known = [field.name for field in fields(kind)]
    if call is not None and call.args:
        raise PlanError(
            f"{ast.unparse(term)!r}: name the parameters of {kind.method_name()} "
            f"({', '.join(known) or 'it has none'})"
        )
    values: dict[str, Any] = {}
    for keyword in call.keywords if call is not None else []:
        if keyword.arg not in known:
            near = difflib.get_close_matches(keyword.arg or "", known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PlanError(
                f"{kind.method_name()} has no parameter {keyword.arg!r}; {hint}"
                f"it has: {', '.join(known) or 'none'}"
            )
        if keyword.arg in values:
            raise PlanError(f"{ast.unparse(term)!r} gives {keyword.arg} twice")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            raise PlanError(
                f"{ast.unparse(term)!r}: {ast.unparse(keyword.value)!r} is not a number, True, "
                "False or a quoted string"
            ) from error
    return kind(**values)


def _why_not(first: Method, second: Method, evict: Evict | None) -> str | None:
    """Why two methods, in the order of their stages, cannot be composed; None if they can.

    Args:
        first, second: of one plan.
        evict: that plan's eviction.
    """
    if first.stage == second.stage:
        return f"both decide the stage '{first.stage}', and a plan has one method per stage"
    own = first.conflict(second) or second.conflict(first)
    if own is not None:
        return own
    for rule in _RULES:
        for a, b in ((first, second), (second, first)):
            if a.stage == rule.stage and b.stage in rule.others and rule.applies(a, b, evict):
                return rule.reason.format(a=a.method_name(), b=b.method_name())
    return None


def _always(a: Method, b: Method, evict: Evict | None) -> bool:
    return True


def _goes_on(a: Method, b: Method, evict: Evict | None) -> bool:
    """Whether the second brings the plan's eviction, and that acts while tokens are generated."""
    brought = b.eviction() if isinstance(b, Merge | Tokens) else b
    return evict is not None and brought == evict and evict.interval is not None


def _gathers(method: Method | None) -> bool:
    """Whether a method needs more of the prompt's tokens than their keys, values and last
    queries."""
    needs = Needs() if method is None else method.needs()
    return needs.attention or needs.similarity or needs.mean_value


class _Rule(NamedTuple):
    """Methods of one stage that do not compose with methods of some others.

    Attributes:
        stage, others: the stages, of methods called a and b.
        applies: whether it holds for a, b and the eviction of their plan.
        reason: why, in a clause that names {a} and {b}.
    """

    stage: str
    others: tuple[str, ...]
    applies: Callable[[Method, Method, Evict | None], bool]
    reason: str


_RULES = (
    _Rule(
        "reuse",
        ("tokens", "place"),
        _always,
        "{a} lays a prompt's first tokens out in the pages before it runs, and {b} decides itself "
        "which of them are computed and where they lie",
    ),
    _Rule(
        "reuse",
        ("evict", "merge", "budget", "select"),
        lambda a, b, evict: _gathers(b) or (isinstance(b, Merge) and _gathers(evict)),
        "{b} gathers statistics from every token of the prompt as it runs, and those that {a} "
        "reuses do not run",
    ),
    _Rule(
        "reuse",
        ("evict", "heads"),
        lambda a, b, evict: getattr(b, "per_chunk", False) or getattr(b, "during_prefill", False),
        "{b} acts on the prompt while it is computed, and what {a} reuses of it is there before",
    ),
    _Rule(
        "share",
        ("tokens", "evict", "budget", "merge", "heads", "codec", "select", "place"),
        _always,
        "{a} stores two layers' tokens together, so both must hold the same exact tokens, "
        "which {b} does not leave them",
    ),
    _Rule(
        "place",
        ("tokens", "evict", "budget", "merge", "heads", "codec", "select"),
        _always,
        "{a} moves full pages to host memory as they fill, and {b} works on pages on the device",
    ),
    _Rule(
        "codec",
        ("tokens", "evict", "merge"),
        _goes_on,
        "{b} goes on evicting single tokens while it generates, and a token cannot leave the "
        "pages that {a} has encoded",
    ),
    _Rule(
        "codec",
        ("select",),
        lambda a, b, evict: cast(Select, b).reads_tokens,
        "{b} reads single tokens, and what {a} has encoded is read by whole pages",
    ),
    _Rule(
        "select",
        ("tokens", "evict", "merge"),
        _goes_on,
        "{b} judges tokens while it generates, and {a} does not read them all",
    ),
    _Rule(
        "draft",
        ("tokens", "evict", "merge"),
        _goes_on,
        "{b} evicts with every generated token, and {a} generates several at once of which some "
        "are taken back",
    ),
    _Rule(
        "draft",
        ("heads", "select"),
        _always,
        "{b} decides for one query at a time, and {a} verifies many at once",
    ),
    _Rule(
        "tokens",
        ("evict", "merge", "budget", "heads", "codec", "select", "draft"),
        lambda a, b, evict: cast(Tokens, a).steps,
        "{a} brings tokens back into layers that had left them out, and {b} expects every token's "
        "place in the cache to be settled",
    ),
    _Rule(
        "tokens",
        ("evict", "merge", "budget", "heads"),
        lambda a, b, evict: cast(Tokens, a).eviction() is not None,
        "{a} decides itself what its layers keep",
    ),
)
"""Pairs of methods that do not compose: when, and why."""
