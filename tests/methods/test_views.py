"""Choosing the highest scores, against sorting them."""

from __future__ import annotations

import torch

from tamis.methods.views import top_mask


def sorted_mask(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The same by a stable sort of every head."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for head, count in enumerate(counts.tolist()):
        held = scores[head].tolist()
        order = sorted(range(len(held)), key=held.__getitem__, reverse=True)
        mask[head, order[: max(0, count)]] = True
    return mask & (scores > -torch.inf)


def test_the_highest_are_chosen_and_of_equal_ones_the_earlier() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads, tokens in ((1, 1), (2, 5), (3, 9), (4, 16)) * 100:
        scores = torch.randint(0, 5, (heads, tokens), generator=generator).float()
        scores[torch.rand(heads, tokens, generator=generator) < 0.2] = torch.inf
        scores[torch.rand(heads, tokens, generator=generator) < 0.2] = -torch.inf
        counts = torch.randint(-1, tokens + 2, (heads,), generator=generator)
        assert torch.equal(top_mask(scores, counts), sorted_mask(scores, counts))


def test_nothing_is_chosen_of_no_heads_and_of_no_tokens() -> None:
    assert top_mask(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0, 3)
    assert top_mask(torch.zeros(2, 0), torch.tensor([1, 0])).shape == (2, 0)
