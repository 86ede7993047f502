"""TokenSelect: a layer's heads vote for the tokens that a step reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Method, Select, param
from tamis.methods.views import DecodeView, Selection


@dataclass(frozen=True)
class TokenSelect(Select):
    """A decode step reads the tokens for which the heads of the layer vote, the first and the last.

    Between the first `n_init` and the last `n_local` tokens, each query head spreads one vote by
    its softmax weights there, and the k tokens with the most votes of all heads are read
    (TokenSelect: the head soft vote). All heads of the layer read the same tokens.

    Queries of consecutive steps are alike: while the cosine similarity of the layer's query, all
    heads in one vector, with the query of the last selection is at least `threshold`, that
    selection is used again, with the tokens that are the last ones now (the selection cache).
    Tokens that have left the last `n_local` since are not read until the next selection.

    The softmax runs over the middle tokens only, as in the reference code, so that a head that
    looks at the first tokens votes like the others. Departure: the prompt itself is computed
    densely, where the paper selects for each of its chunks too.
    """

    paper: ClassVar[str] = (
        "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via "
        "Dynamic Token-Level KV Cache Selection (arXiv:2411.02886)"
    )
    reads_tokens: ClassVar[bool] = True
    k: int | float = param(
        2048, "tokens chosen by vote, or (a decimal) their share of the cached ones", above=0
    )
    n_init: int = param(128, "first tokens, always read", minimum=0)
    n_local: int = param(512, "last tokens, always read", minimum=1)
    threshold: float = param(
        0.9, "similarity of queries from which a selection is used again", maximum=1.0
    )

    def conflict(self, other: Method) -> str | None:
        if other.stage in ("evict", "merge", "heads"):
            return (
                "its heads vote for tokens by their place in the cache, "
                f"and after {other.method_name()} each head may hold other tokens"
            )
        return None

    def select(self, view: DecodeView) -> Selection | None:
        length = int(view.lengths.max())
        k = math.ceil(self.k * length) if isinstance(self.k, float) else self.k
        if self.n_init + k + self.n_local >= length:
            return None
        first_local = length - self.n_local
        query = view.q.flatten().float()
        if not self._still_good(view.state.get("tokenselect"), query, first_local):
            votes = view.weights(first=self.n_init, last=self.n_local).sum(0, keepdim=True)
            count = self.n_init + k + self.n_local
            voted = view.top_tokens(votes, count, first=self.n_init, last=self.n_local)
            chosen = voted[0, self.n_init : self.n_init + k]
            view.state["tokenselect"] = (query, chosen)
        _, chosen = view.state["tokenselect"]
        index = torch.arange(length, device=query.device)
        tokens = torch.cat([index[: self.n_init], chosen, index[first_local:]])
        return Selection(tokens=tokens.expand(len(view.lengths), -1))

    def _still_good(
        self, last: tuple[Tensor, Tensor] | None, query: Tensor, first_local: int
    ) -> bool:
        """Whether the last selection, if there is one, serves `query` too: its query must be alike,
        and the cache not have become shorter than its tokens need."""
        if last is None:
            return False
        alike = torch.cosine_similarity(last[0], query, dim=0) >= self.threshold
        return bool(alike & (last[1][-1] < first_local))
