"""Which methods there are: those of tamis, and those that other packages register."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from tamis.errors import PlanError
from tamis.methods.base import STAGES, Method

GROUP = "tamis.methods"
"""The entry-point group of other packages' methods: `name = package.module:Class`."""

_OWN = {
    "prefill": ("minference:MInference", "flexprefill:FlexPrefill"),
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
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise PlanError(f"the entry point {entry.name!r} ({entry.value}) is not a method class")
        if method.method_name() in found:
            raise PlanError(
                f"{entry.value} registers the method {method.method_name()!r} a second time"
            )
        found[method.method_name()] = method
    return dict(sorted(found.items(), key=lambda item: STAGES.index(item[1].stage)))


def method_class(name: str) -> type[Method]:
    """The method of that name, in any case.

    Raises:
        PlanError: there is none; the message names the nearest.
    """
    known = methods()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"unknown method {name!r}{hint} `tamis methods` lists all")
    return known[name.lower()]
