"""What methods of this stage have in common: which tokens go on."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.methods.views import top_mask


def best_and_last(tokens: Tensor, scores: Tensor, count: int) -> Tensor:
    """The last token, without which nothing could be generated, and the highest scores.

    Args:
        tokens: ascending, int64 [n].
        scores: of those tokens, [n], on any device; of equal ones the earlier goes first.
        count: how many to choose, the last one included; at least 1.

    Returns:
        int64 [min(count, n)], ascending.
    """
    scores = scores.float().to(tokens.device, copy=True)
    scores[-1] = torch.inf
    return tokens[top_mask(scores[None], [count])[0]]
