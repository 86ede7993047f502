"""Quest: a step reads the pages whose keys could match its query best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Select, param
from tamis.methods.views import Column, DecodeView, Selection


@dataclass(frozen=True)
class Quest(Select):
    """A decode step reads the pages with the largest upper bounds of the attention score.

    Every full page keeps the smallest and the largest element of its keys in each channel; the
    products of a query q with its keys are at most

        bound(page) = sum_i max(q_i min_i, q_i max_i),

    and the `pages` pages of largest bound are read (Quest, algorithm 1). The last
    page is always among them: it holds the newest tokens. The first two layers, which attend
    widely, read everything.

    The paper's models have one query head per KV head. Where several share one they must read the
    same pages: a page's score is then the largest of their bounds.

    Departures from the paper: pages are the engine's (64 tokens by default, the paper's 16), so the
    paper's budgets of 256 to 4096 tokens are 4 to 64 pages. The default is the upper end.
    """

    paper: ClassVar[str] = (
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (arXiv:2406.10774)"
    )
    pages: int | float = param(
        64, "pages that a step reads, or (a decimal) their share of the cached ones", above=0
    )
    skip_layers: int = param(2, "first layers, which read everything", minimum=0)

    def summaries(self, k_dim: int, dtype: torch.dtype) -> list[Column]:
        return [Column(name, dtype, k_dim, rows=1) for name in ("k_min", "k_max")]

    def summarize(self, k: Tensor) -> dict[str, Tensor]:
        return {"k_min": k.amin(-2), "k_max": k.amax(-2)}

    def select(self, view: DecodeView) -> Selection | None:
        """`pages` pages per head; what a head with fewer has beyond its own are numbers of pages
        after its last."""
        if view.layer < self.skip_layers:
            return None
        cached = -(-int(view.lengths.max()) // view.page_size)
        count = self.pages
        if isinstance(count, float):
            count = math.ceil(count * cached)
        if count >= cached:
            return None
        return Selection(pages=view.top_pages("k_min", "k_max", count))
