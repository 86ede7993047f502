"""Which methods there are: those of tamis, and those that other packages register."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from inspect import isabstract

from tamis.errors import PlanError
from tamis.methods.base import STAGES, Method

GROUP = "tamis.methods"
"""The entry-point group of other packages' methods: `name = package.module:Class`."""

_OWN = {
    "reuse": ("promptcache:PromptCache", "cacheblend:CacheBlend"),
    "prefill": ("minference:MInference", "flexprefill:FlexPrefill"),
    "tokens": ("gemfilter:GemFilter", "lazyllm:LazyLLM", "pyramidinfer:PyramidInfer"),
    "budget": (
        "squeezeattention:SqueezeAttention",
        "zigzagkv:ZigZagKV",
        "headadaptive:HeadAdaptive",
    ),
    "evict": (
        "streamingllm:StreamingLLM",
        "h2o:H2O",
        "scissorhands:Scissorhands",
        "snapkv:SnapKV",
        "lagkv:LagKV",
    ),
    "merge": ("d2o:D2O", "kvmerger:KVMerger"),
    "heads": ("duoattention:DuoAttention", "razorattention:RazorAttention"),
    "codec": ("kivi:KIVI", "gear:GEAR", "think:ThinK"),
    "share": ("minicache:MiniCache",),
    "select": ("quest:Quest", "sparq:SparQ", "tokenselect:TokenSelect"),
    "place": ("headinfer:HeadInfer",),
    "draft": ("tokenrecycling:TokenRecycling",),
}


@cache
def methods() -> dict[str, type[Method]]:
    """Every method by its name in plans, in the order of the stages.

    Raises:
        PlanError: another package registers something that is no method, or a name that is taken.
    """
    found = {}
    for stage, names in _OWN.items():
        for name in names:
            module, _, symbol = name.partition(":")
            method = getattr(import_module(f"tamis.methods.{stage}.{module}"), symbol)
            found[method.method_name()] = method
    for entry in entry_points(group=GROUP):
        try:
            method = entry.load()
        except Exception as error:
            raise PlanError(
                f"the method {entry.name!r} ({entry.value}) cannot be loaded: {error}"
            ) from error
        wrong = _why_no_method(method)
        if wrong is not None:
            raise PlanError(f"the entry point {entry.name!r} ({entry.value}) {wrong}")
        if method.method_name() in found:
            raise PlanError(
                f"{entry.value} registers the method {method.method_name()!r} a second time"
            )
        found[method.method_name()] = method
    return dict(sorted(found.items(), key=lambda item: STAGES.index(item[1].stage)))


def _why_no_method(loaded: object) -> str | None:
    """What is wrong with what an entry point names, in a clause; None if it is a method."""
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        return "is not a method class; derive it from a stage's class in tamis.methods.base"
    if isabstract(loaded):
        return f"does not define {', '.join(sorted(loaded.__abstractmethods__))}"
    if "__dataclass_fields__" not in vars(loaded):
        return "is not a dataclass; put @dataclass(frozen=True) before it"
    if not hasattr(loaded, "paper"):
        return "names no paper; give it `paper: ClassVar[str] = ...`"
    return None


def method_class(name: str) -> type[Method]:
    """The method of that name, in any case.

    Raises:
        PlanError: there is none; the message names the nearest.
    """
    known = methods()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), [*known, "dense"], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PlanError(f"unknown method {name!r}; {hint}`tamis methods` lists all")
    return known[name.lower()]
