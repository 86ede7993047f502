"""PromptCache: prompts put together from text whose KV was computed before, and nothing again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tamis.methods.base import Reuse
from tamis.methods.views import ModelShape


@dataclass(frozen=True)
class PromptCache(Reuse):
    """The KV of every context (the paper's prompt modules) is taken as it was computed once, for
    the context alone; only what follows them is computed.

    With `K_i, V_i` the keys and values that the context `i` was given without any other, a prompt
    of contexts 1 .. m and uncached text `x` has (section 3.4)

        K = [K_1 ... K_m K_x],   V = [V_1 ... V_m V_x],   the queries of x attend to all of them

    so tokens of a context attend within their context only, and text after them to everything. The
    first context is exact. The method has no parameters.

    Departures. The paper's schema gives each module a range of positions of its own, in which it is
    computed and stays, with gaps where a prompt leaves modules out, and unused parameter slots.
    Here contexts are computed from position 0, and when they are joined they lie one after the
    other without gaps, in the order in which the prompt names them: keys are turned to where they
    come to lie. So one context serves at every place of a prompt, and no schema has to be written.
    A model with positions that cannot be turned may go on from one context only. There are no
    parameters within modules, unions or scaffolds.

    Special tokens. A text that becomes a context begins, as every prompt does, with what the
    tokenizer puts first (often BOS). It stays where contexts are joined, as part of each of them:
    their other tokens were computed with it, and attend to it as a sink. The paper's modules do not
    begin so; contexts given as token ids need not either.
    """

    paper: ClassVar[str] = (
        "Prompt Cache: Modular Attention Reuse for Low-Latency Inference (arXiv:2311.04934)"
    )

    def program(self, lengths: Sequence[int], prompt_tokens: int, shape: ModelShape) -> None:
        """Nothing is computed again."""
