"""Decode steps read encoded pages where they lie, for all sequences of a codec together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from tamis import LLM, SamplingParams
from tamis.engine import encoded
from tamis.methods.base import Codec
from tamis.platform import native_module
from tests.methods.engine.plans import CASES

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PLANS = [CASES[name].plan for name in ("kivi", "gear", "think")]
PLANS += [f"{PLANS[0]} + quest(pages=3)", f"snapkv(budget=96) + {PLANS[0]}"]


@pytest.mark.skipif(native_module(warn=False) is None, reason="the extension is not built")
@pytest.mark.parametrize("plan", PLANS)
def test_yields_what_the_reference_backend_yields(
    make: Callable[..., LLM],
    prompts: list[list[int]],
    plan: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for backend in ("native", "reference"):
        monkeypatch.setenv("TAMIS_BACKEND", backend)
        outputs = make().generate(prompts, GREEDY, plan=plan)
        found.append([output.completions[0].token_ids for output in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("plan", PLANS[:3])
def test_one_call_per_layer_reads_the_pages_of_all_sequences(
    make: Callable[..., LLM],
    prompts: list[list[int]],
    plan: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And none is decoded; a sequence without a plan and one with a codec of its own stand among
    them."""
    calls: list[int] = []
    run = encoded.decode_encoded

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(len(q))
        return run(q, *args, **kwargs)

    def refused(*_: object) -> None:
        raise AssertionError("a page was decoded")

    monkeypatch.setattr(encoded, "decode_encoded", counted)
    monkeypatch.setattr(Codec, "decode", refused)
    llm = make()
    outputs = llm.generate(prompts, GREEDY, plan=[plan, "dense", PLANS[0], plan])
    assert all(output.error is None for output in outputs), [o.error for o in outputs]
    together = [3] if plan == PLANS[0] else [2, 1]
    assert calls[-3 * len(together) :] == together * 3  # of the last step, 3 layers
