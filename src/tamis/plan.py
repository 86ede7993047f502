"""Plans: which methods act on a request's KV cache.

A plan is a composition of methods, written the same way in Python and as a string. The empty plan
is `"dense"`: exact attention over every token.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from tamis.errors import PlanError

_TERM = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_-]*)\s*(\(.*\))?\s*", re.DOTALL)
_KNOWN = ("dense",)


@dataclass(frozen=True)
class Plan:
    """A request's plan. This version runs exact attention only, so every plan is `"dense"`."""

    @classmethod
    def parse(cls, plan: str | Plan | None) -> Plan:
        """The plan that a string names; a `Plan` is returned as it is, None is `"dense"`.

        Raises:
            PlanError: the string names an unknown method or is not a plan at all.
        """
        if plan is None or isinstance(plan, Plan):
            return plan or cls()
        if not isinstance(plan, str):
            raise PlanError(f"a plan is a string such as 'dense', not {type(plan).__name__}")
        match = _TERM.fullmatch(plan)
        if match is None:
            raise PlanError(f"{plan!r} is not a plan; write 'dense'")
        name, arguments = match.groups()
        if name.lower() not in _KNOWN:
            near = difflib.get_close_matches(name.lower(), _KNOWN, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"unknown method {name!r} in plan {plan!r}{hint} Known: dense")
        if arguments is not None:
            raise PlanError(f"'dense' takes no parameters, got {arguments}")
        return cls()

    def __str__(self) -> str:
        return "dense"
