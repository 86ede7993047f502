"""CacheBlend: reused chunks of text, of which the tokens that others change most are computed
again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tamis.errors import PlanError
from tamis.methods.base import Method, Reuse, param
from tamis.methods.views import ModelShape, Pass, PassResult, top_mask


@dataclass(frozen=True)
class CacheBlend(Reuse):
    """The KV of every context is taken as it was computed alone, and then put right for the tokens
    for which it is most wrong, because they attend to other contexts.

    All tokens run through the first layer, which leaves its keys and values as they are, turned to
    their positions. At layer `l` > 1 those that ran through layer `l - 1` are given new keys and
    values, and by their KV deviation (section 4.1)

        delta_i = || [K_i^new, V_i^new] - [K_i, V_i] ||_2

    the `r_l` of largest delta are chosen, of all reused tokens (HKVD tokens; gradual filtering,
    section 4.3). These go through layer `l`: their keys and values take the place of the reused
    ones, and their queries attend to all tokens before them, as the KV is then. The text after the
    contexts goes through all layers. `recompute`, the mean of all r_l, is the paper's 15 %.

    The paper has r_l fall slowly from "slightly higher" than the mean and gives no numbers. Here
    they fall linearly from (1 + spread) to (1 - spread) times the mean, by less where that would
    exceed 1.

    Departures. The first context is exact, as a prefix is, so shares are of the tokens of the
    others only, and none of it is computed again. Deviations are known layer by layer before the
    layer's attention runs, as in the paper's figure 9; its reference code measures one layer only,
    by the values alone, and keeps the tokens that it chooses there for all later layers. With
    `recompute=0` the first layer is not run either. Loading KV while it computes is not a matter
    of this method: contexts lie in memory. Special tokens are treated as PromptCache treats them.
    """

    paper: ClassVar[str] = (
        "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion "
        "(arXiv:2405.16444)"
    )

    recompute: float = param(
        0.15, "mean share of the reused tokens computed again in a layer", minimum=0, maximum=1
    )
    spread: float = param(
        0.2,
        "how far, of the mean, the shares of layers lie above and below it",
        minimum=0,
        maximum=1,
    )

    def conflict(self, other: Method) -> str | None:
        """Sparse prefill: tokens that are computed again are no chunk of consecutive ones."""
        if other.stage != "prefill":
            return None
        return (
            f"{self.method_name()} computes single tokens of the prompt again, and "
            f"{other.method_name()} takes chunks of consecutive ones"
        )

    def program(
        self, lengths: Sequence[int], prompt_tokens: int, shape: ModelShape
    ) -> Generator[Pass, PassResult, None] | None:
        """One pass per layer; None if there is nothing to be put right.

        Raises:
            PlanError: a layer has a sliding window, which contexts hold the ends of only.
        """
        if any(layer.window is not None for layer in shape.layers):
            raise PlanError(
                f"{self} computes tokens anywhere in a context again, and this model's layers with "
                "a sliding window hold no more than its end; promptcache() can join its contexts"
            )
        first, reused = lengths[0], sum(lengths)
        if first == reused or not self.recompute:
            return None
        return self._passes(first, reused, prompt_tokens, shape.n_layers)

    def shares(self, n_layers: int) -> list[float]:
        """The share of reused tokens of every layer but the first, [n_layers - 1]."""
        reach = min(self.spread * self.recompute, 1 - self.recompute)
        slope = torch.linspace(1, -1, n_layers - 1, dtype=torch.float64) if n_layers > 2 else [0.0]
        return [self.recompute + reach * float(way) for way in slope][: n_layers - 1]

    def _passes(
        self, first: int, reused: int, prompt_tokens: int, n_layers: int
    ) -> Generator[Pass, PassResult, None]:
        """All tokens from `first` on at layer 0, then of the reused ones the chosen."""
        tokens = torch.arange(first, prompt_tokens)
        for layer, share in enumerate(self.shares(n_layers), start=1):
            result = yield Pass(tokens, range(layer - 1, layer), deviation=True)
            assert result.deviation is not None
            count = round(share * (reused - first)) + prompt_tokens - reused
            tokens = tokens[top_mask(result.deviation[None], [count])[0]]
        yield Pass(tokens, range(n_layers - 1, n_layers))
