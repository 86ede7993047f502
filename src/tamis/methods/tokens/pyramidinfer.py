"""PyramidInfer: the deeper a layer, the fewer tokens it computes and caches."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Evict, Tokens, param
from tamis.methods.tokens.pyramid import (
    PyramidGeneration,
    context_length,
    importance,
    kept_share,
)
from tamis.methods.views import ModelShape, Pass, PassResult, top_mask


@dataclass(frozen=True)
class PyramidInfer(Tokens):
    """After every layer, the tokens to which the recent tokens attend least go no further: deeper
    layers compute and cache what is left.

    The prompt is its context and, at its end, the recent tokens: the share `recent` and one. With
    `a_h[i, j]` the weights of layer `l` of `L`, from the recent tokens `i` to those `j` of the
    context that reached it, and counts `c_i` from 1 (the oldest) evenly up to `distance`,

        s_j = mean_h mean_i c_i a_h[i, j]
        p_l = decay + (1 - decay) (1 + cos(pi l / L)) / 2

    and the `floor(p_l n)` of those `n` tokens with the highest `s` go on to layer `l + 1`, the
    first `sinks` of the prompt among them; all `n` if fewer than `minimum` would be left
    (algorithm 1). Recent tokens always go on. Generated tokens are thinned out in the same way
    when they are recent no longer (`PyramidGeneration`), down to the share `generated`.

    Defaults, the cosine, the counts and the sinks are those of the reference code for Llama 2 and
    3. A layer caches what reached it, as there; the paper's figure drops what does not go on too.
    Departures:

    - The last `queries` recent tokens judge, not all of a fifth of the prompt, whose weights would
      be a matrix that grows with the square of the prompt. Up to some 300 tokens nothing differs.
    - Generated tokens are judged at fixed intervals, those that have left the recent ones
      meanwhile; the reference code waits for a layer to have 16 of them, and scales what it keeps
      by a further, undocumented 0.9.
    """

    paper: ClassVar[str] = PyramidGeneration.paper
    query_dependent: ClassVar[bool] = True

    decay: float = param(
        0.9, "share of its context that the deepest layer keeps", above=0, maximum=1
    )
    generated: float = param(
        0.1, "share of generated tokens that the deepest layer keeps", above=0, maximum=1
    )
    recent: float = param(0.2, "share of the tokens that is recent and stays", minimum=0, maximum=1)
    minimum: int = param(64, "tokens of the context that every layer keeps", minimum=0)
    sinks: int = param(4, "first tokens that every layer keeps", minimum=0)
    distance: float = param(1.2, "weight of the newest query, the oldest's being 1", above=0)
    queries: int = param(64, "last queries that judge", minimum=1)
    interval: int = param(16, "generated tokens between two rounds of judging", minimum=1)

    def eviction(self) -> Evict | None:
        """What thins out generated tokens; None if all of them stay."""
        if self.generated == 1.0:
            return None
        return PyramidGeneration(
            least=self.generated,
            recent=self.recent,
            distance=self.distance,
            queries=self.queries,
            every=self.interval,
        )

    def program(self, prompt_tokens: int, shape: ModelShape) -> Generator[Pass, PassResult, None]:
        """A pass up to every layer after which tokens leave, and one through the last layers."""
        recents = prompt_tokens - context_length(prompt_tokens, self.recent)
        tokens, begin = torch.arange(prompt_tokens), 0
        for layer in range(shape.n_layers - 1):
            context = len(tokens) - recents
            stay = int(kept_share(self.decay, layer, shape.n_layers) * context)
            if stay == context or stay <= self.minimum:
                continue
            result = yield Pass(tokens, range(begin, layer + 1), observe=min(self.queries, recents))
            assert result.weights is not None
            tokens = self._going_on(tokens, result.weights, stay, recents)
            begin = layer + 1
        yield Pass(tokens, range(begin, shape.n_layers))

    def _going_on(self, tokens: Tensor, weights: Tensor, stay: int, recents: int) -> Tensor:
        """The best `stay` of the context and the recent tokens, ascending.

        Args:
            tokens: those that reached the layer, [n].
            weights: of its last queries, fp32 [q_heads, m, n].
        """
        context, rest = tokens[:-recents], tokens[-recents:]
        scores = importance(weights, recents, self.distance)[: len(context)].to(tokens.device)
        scores[context < self.sinks] = torch.inf
        return torch.cat([context[top_mask(scores[None], [stay])[0]], rest])
