"""Every method as the tiny models can show it: set to act on prompts of some hundred tokens, set to
change nothing, and what it must leave in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from tamis.errors import PlanError
from tamis.methods.registry import methods
from tamis.plan import Plan

PAGE = 16
"""Tokens per page in these tests."""

_EVICTION = "snapkv(budget=0.3, window=8, kernel=3)"
_NO_EVICTION = "snapkv(budget=4096, window=8)"


@dataclass(frozen=True)
class Case:
    """One method.

    Attributes:
        term: the method as a plan writes it, set so that a prompt of 200 tokens sees it act.
        exact: the same with all tokens kept, read and stored exactly.
        base, exact_base: the methods without which it cannot be, set in the same two ways.
        held: tokens that every KV head has in live pages after a prompt of so many, computed in one
            chunk; None where heads differ.
        merging: of a method that brings an eviction, the term beside another eviction.
        columns: bytes that a page of PAGE tokens has beside its keys, values and positions.
    """

    term: str
    exact: str
    base: str = ""
    exact_base: str = ""
    held: Callable[[int], int] | None = lambda n: n
    merging: str = ""
    columns: int = 0

    @property
    def plan(self) -> str:
        """A whole plan in which the method acts."""
        return " + ".join(filter(None, (self.base, self.term)))

    @property
    def exact_plan(self) -> str:
        """A whole plan in which it changes nothing."""
        return " + ".join(filter(None, (self.exact_base, self.exact)))


def _lagkv_held(n: int, sinks: int = 4, lag: int = 16) -> int:
    """Half of the prompt, to the next whole number of tokens in each compressed partition."""
    compressed = (n - sinks) // lag - 1
    kept = (n // 2 - n + compressed * lag) // compressed
    return n - compressed * (lag - kept)


def _not_encoded(residual: int) -> Callable[[int], int]:
    """Tokens that a codec leaves exact: the residual and less than a page."""
    return lambda n: n - (n - residual) // PAGE * PAGE


CASES: dict[str, Case] = {
    # Without contexts these are exact attention; with them they are tried in tests/methods/reuse.
    "promptcache": Case("promptcache()", "promptcache()"),
    "cacheblend": Case("cacheblend()", "cacheblend()"),
    "minference": Case("minference(verticals=30, slashes=50, last_q=16, block=16)", "minference()"),
    "flexprefill": Case(
        "flexprefill(gamma=0.5, min_budget=16, block=16)", "flexprefill(min_budget=4096)"
    ),
    "gemfilter": Case(
        "gemfilter(layer=1, budget=0.4)", "gemfilter(budget=4096)", held=lambda n: round(0.4 * n)
    ),
    "lazyllm": Case("lazyllm(keep=0.6, prunings=2)", "lazyllm(keep=1.0)", held=None),
    "pyramidinfer": Case(
        "pyramidinfer(decay=0.5, minimum=8, queries=16, interval=4)",
        "pyramidinfer(decay=1.0, generated=1.0)",
        held=None,
    ),
    "squeezeattention": Case(
        "squeezeattention()", "squeezeattention()", _EVICTION, _NO_EVICTION, held=None
    ),
    "zigzagkv": Case(
        "zigzagkv(window=8)", "zigzagkv(window=8)", _EVICTION, _NO_EVICTION, held=None
    ),
    "headadaptive": Case("headadaptive()", "headadaptive()", _EVICTION, _NO_EVICTION, held=None),
    "streamingllm": Case("streamingllm(budget=48)", "streamingllm(budget=4096)", held=lambda n: 48),
    "h2o": Case("h2o(budget=0.3)", "h2o(budget=4096)", held=lambda n: round(0.3 * n), columns=64),
    "scissorhands": Case(
        "scissorhands(budget=0.3, history=16, recent=8, interval=4)",
        "scissorhands(budget=4096, history=16)",
        held=lambda n: round(0.3 * n) - round(0.5 * round(0.3 * n)),
    ),
    "snapkv": Case(_EVICTION, _NO_EVICTION, held=lambda n: round(0.3 * n)),
    "lagkv": Case(
        "lagkv(budget=0.5, sinks=4, lag=16)",
        "lagkv(budget=4096, sinks=4, lag=16)",
        held=_lagkv_held,
    ),
    "d2o": Case(
        "d2o(budget=0.3)",
        "d2o(budget=4096)",
        held=lambda n: round(0.3 * n),
        merging="d2o()",
        columns=64,
    ),
    "kvmerger": Case(
        "kvmerger(budget=0.4, threshold=0.3)",
        "kvmerger(budget=4096)",
        held=None,
        merging="kvmerger(threshold=0.3)",
        columns=64,
    ),
    "duoattention": Case(
        "duoattention(sinks=4, recent=24)", "duoattention(sinks=4, recent=4096)", held=None
    ),
    "razorattention": Case(
        "razorattention(sinks=4, buffer=24)", "razorattention(buffer=4096)", held=None
    ),
    "kivi": Case(
        "kivi(bits=2, group_size=16, residual=32)",
        "kivi(group_size=16, residual=4096)",
        held=_not_encoded(32),
    ),
    "gear": Case(
        "gear(bits=4, group_size=16, residual=20, rank=2)",
        "gear(group_size=16, residual=4096)",
        held=_not_encoded(20),
    ),
    "think": Case(
        "think(ratio=0.4, window=8, residual=16)",
        "think(ratio=0.0, window=8, residual=16)",
        held=_not_encoded(16),
    ),
    "minicache": Case("minicache(gamma=0.3)", "minicache(start=1.0)", held=None),
    "quest": Case("quest(pages=4, skip_layers=1)", "quest(pages=1.0, skip_layers=0)", columns=128),
    "sparq": Case("sparq(r=0.5, k=48)", "sparq(k=1.0)"),
    "tokenselect": Case("tokenselect(k=32, n_init=8, n_local=16)", "tokenselect(k=1.0)"),
    "headinfer": Case("headinfer()", "headinfer()", held=lambda n: n % PAGE),
    "tokenrecycling": Case("tokenrecycling(k=4, depth=3)", "tokenrecycling(k=4, depth=3)"),
}
"""Every method by its name in plans."""

LOSSLESS = ("headinfer", "tokenrecycling")
"""Methods whose results are exact as they stand."""

LONG = (
    "minference(verticals=30, slashes=50, last_q=16, block=16) + snapkv(budget=0.5, window=8) + "
    "kivi(bits=2, group_size=16, residual=32) + quest(pages=3, skip_layers=1)",
    "duoattention(sinks=4, recent=24) + snapkv(budget=0.5, window=8) + "
    "kivi(bits=2, group_size=16, residual=16)",
    "snapkv(budget=0.3, window=8) + headadaptive() + d2o()",
)
"""Plans of three and four methods."""


def pair(first: str, second: str) -> str:
    """Two methods, and what they cannot be without, as one plan."""
    cases = [CASES[name] for name in (first, second)]
    stages = {methods()[name].stage for name in (first, second)}
    if "evict" in stages:
        terms = [case.merging or case.term for case in cases]
    else:
        terms = [case.term for case in cases]
    bases = set() if stages & {"evict", "merge"} else {case.base for case in cases}
    return " + ".join(filter(None, [*sorted(bases), *terms]))


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """All pairs of methods of different stages: those that compose, and those that are refused."""
    composed: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for one, other in combinations(CASES, 2):
        if methods()[one].stage == methods()[other].stage:
            continue
        try:
            Plan.parse(pair(one, other))
        except PlanError:
            refused.append((one, other))
        else:
            composed.append((one, other))
    return composed, refused
