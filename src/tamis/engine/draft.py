"""Draft trees: which proposed tokens each one sees, and how far a model agrees with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tamis.methods.views import DraftTree


def depths(tree: DraftTree) -> Tensor:
    """How many tokens lie between each proposed token and the request's last, from 1, [n]."""
    return visible(tree).sum(1)[1:] - 1


def visible(tree: DraftTree) -> Tensor:
    """Which tokens each token of a step sees: bool [n + 1, n + 1], the request's last token first.

    Each sees itself and what leads to it.
    """
    n = len(tree.tokens) + 1
    sees = torch.eye(n, dtype=torch.bool)
    sees[:, 0] = True
    for node, parent in enumerate(tree.parents.tolist(), 1):  # parents come before children
        sees[node] |= sees[parent + 1]
    return sees


def accept(tree: DraftTree, sample: Callable[[int], int]) -> list[int]:
    """Follow the tree as far as what is sampled agrees with it.

    Args:
        tree: what was proposed.
        sample: samples the token after row `i` of the step (0 is the request's last token) and
            notes it as generated.

    Returns:
        The rows that were right, row 0 first; one token was sampled after each.
    """
    rows = [0]
    children: dict[tuple[int, int], int] = {}
    for node, (token, parent) in enumerate(
        zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True), 1
    ):
        children.setdefault((parent + 1, token), node)
    while True:
        token = sample(rows[-1])
        following = children.get((rows[-1], token))
        if following is None:
            return rows
        rows.append(following)
