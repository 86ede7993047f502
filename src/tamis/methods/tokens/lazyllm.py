"""LazyLLM: tokens stop on their way through the layers, and go on when they are needed."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.base import Tokens, param
from tamis.methods.tokens.choice import best_and_last
from tamis.methods.views import ModelShape, Pass, PassResult


@dataclass(frozen=True)
class LazyLLM(Tokens):
    """At some layers, only the tokens to which the newest token attends go on; the others wait
    there, and a later step that attends to them takes them along.

    After such a layer `l`, the importance of token `i` is the newest token's attention to it, the
    mean over the heads,

        s_i = (1 / H) sum_h a_h[newest, i]

    Of the tokens that took part in layer `l`, those below a percentile of `s` are pruned: here the
    share `keep` of highest `s` stays (progressive token pruning). This holds for the prompt, with
    its last token as the newest, and for every generated token. A token that a step keeps but that
    an earlier one had pruned at this layer has no key there: it goes on from the hidden state with
    which it left (the Aux Cache). So every token goes through every layer at most once.

    The paper tunes layers and percentiles for each model and task, and no code is public. Here
    four layers, evenly spread from 0.3 to 0.9 of the depth, prune 30 % each. A share is rounded up,
    the newest token always goes on, and of equally important tokens the earlier do.
    """

    paper: ClassVar[str] = (
        "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference (arXiv:2407.14057)"
    )
    query_dependent: ClassVar[bool] = True
    steps: ClassVar[bool] = True

    keep: float = param(0.7, "share of the tokens that each pruning lets go on", above=0, maximum=1)
    prunings: int = param(4, "how often tokens are pruned on the way", minimum=1)
    first: float = param(0.3, "share of the depth before the first pruning", minimum=0, maximum=1)
    last: float = param(0.9, "share of the depth before the last pruning", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last < self.first:
            raise PlanError(f"{self}: last must be at least first, which is {self.first}")

    def program(self, prompt_tokens: int, shape: ModelShape) -> Generator[Pass, PassResult, None]:
        nothing = [torch.zeros(0, dtype=torch.int64)] * shape.n_layers
        return self._passes(torch.arange(prompt_tokens), nothing)

    def step(
        self, token: int, cached: Sequence[Tensor], shape: ModelShape
    ) -> Generator[Pass, PassResult, None]:
        """Passes of the new token and of tokens that had been pruned and are needed now."""
        return self._passes(torch.tensor([token]), cached)

    def _passes(
        self, tokens: Tensor, cached: Sequence[Tensor]
    ) -> Generator[Pass, PassResult, None]:
        """One pass between every two prunings.

        Args:
            tokens: those that begin at layer 0, [n]; the newest is the last.
            cached: per layer the tokens that it holds already, ascending.
        """
        running, seen = tokens, torch.cat([cached[0], tokens])
        *before, rest = self._spans(len(cached))
        for layers in before:
            held = cached[layers.stop]
            result = yield Pass(running, layers, observe=1, sees=_only(seen, cached[layers[0]]))
            scores = _importance(result, seen)
            seen = best_and_last(seen, scores, math.ceil(self.keep * len(seen)))
            running = seen[~torch.isin(seen, held)]
        yield Pass(running, rest, sees=_only(seen, cached[rest[0]]))

    def _spans(self, n_layers: int) -> list[range]:
        """The layers from each pruning to the next."""
        depths = torch.linspace(self.first, self.last, self.prunings, dtype=torch.float64)
        cuts = {round(depth * n_layers) for depth in depths.tolist()} & set(range(1, n_layers))
        return [range(*span) for span in pairwise([0, *sorted(cuts), n_layers])]


def _only(seen: Tensor, held: Tensor) -> Tensor | None:
    """What a pass sees: `seen`, None if that is all that its layers hold, and its own tokens."""
    return None if bool(torch.isin(held, seen).all()) else seen


def _importance(result: PassResult, seen: Tensor) -> Tensor:
    """The newest token's attention to the tokens that it has seen, mean over heads: fp32 [n].

    Weights are over all that the layer holds, so each head's are scaled to sum to one over what
    was seen.
    """
    assert result.weights is not None
    assert result.keys is not None
    mine = torch.isin(result.keys, seen).to(result.weights.device)
    weights = result.weights[:, -1, mine]
    total = weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weights / total).mean(0)
