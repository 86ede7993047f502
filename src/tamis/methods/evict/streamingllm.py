"""StreamingLLM: the first tokens and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods.base import Evict, budget_param, param
from tamis.methods.views import LayerView


@dataclass(frozen=True)
class StreamingLLM(Evict):
    """Keeps the first tokens, on which attention rests whatever they say, and a window of recent
    ones (section 3.2).

    With budget `b`, a head keeps the tokens at positions below `sinks` and the `b - sinks` newest.
    What is left takes the positions 0, 1, 2, ... within the cache, not those of the text, so that
    no distance grows beyond what the model was trained on.

    Defaults: 4 sinks and 1,020 recent tokens ("4+1020", table 1). The paper evicts at every token;
    `interval` does so every few tokens, which lets the cache exceed the budget by as many. Prompts
    that come in chunks are evicted after each chunk, not after each token, so their queries see up
    to a chunk more than the paper's window.
    """

    paper: ClassVar[str] = (
        "Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453)"
    )
    per_chunk: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    budget: int | float = budget_param(1024)
    sinks: int = param(4, "first tokens that always stay", minimum=0)
    in_cache: bool = param(True, "whether tokens take their positions within the cache")
    interval: int = param(1, "generated tokens between two evictions", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, int) and self.budget <= self.sinks:
            raise PlanError(
                f"{self}: a budget of {self.budget} tokens leaves none beside {self.sinks} sinks; "
                f"it must be at least {self.sinks + 1}"
            )

    @property
    def in_cache_positions(self) -> bool:
        return self.in_cache

    def scores(self, view: LayerView) -> Tensor:
        """Positions: the later, the more important; sinks above all."""
        return view.positions.float().masked_fill(
            view.cached & (view.positions < self.sinks), torch.inf
        )
