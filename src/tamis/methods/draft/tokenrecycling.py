"""Token Recycling: what the model once ranked high after a token is proposed after it again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from tamis.methods.base import Draft, param
from tamis.methods.views import DraftTree

CHILDREN = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)
"""The paper's static tree of 80 nodes: children of each node, level by level from the root. A
node's children are the best-ranked candidates of its token, in order of rank."""


@dataclass(frozen=True)
class TokenRecycling(Draft):
    """A tree of continuations is read out of the candidates that earlier steps left over.

    A matrix [vocab, 8] holds for every token the 8 candidates that the model ranked highest when it
    last saw that token (Token Recycling: the adjacency matrix). From the request's last token a
    static tree of 80 nodes, 6 deep, is filled breadth first, child number i of a node being
    candidate number i of its token (draft tree retrieval, algorithm 1); the engine verifies it in
    one step. Every verified position, accepted or not, then replaces the row of its token
    (verification and update).

    `k` and `depth` cut the tree to the nodes that use the first k candidates only and are at most
    `depth` deep: where a step is bound by arithmetic, as on a CPU, 80 tokens cost more than one.

    Departure: the matrix begins empty, and a token never seen has no children, where the paper's
    begins with zeros and would propose token 0.
    """

    paper: ClassVar[str] = (
        "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token "
        "Recycling (arXiv:2408.08696)"
    )
    k: int = param(8, "candidates kept per token", minimum=1, maximum=8)
    depth: int = param(6, "levels of the tree", minimum=1, maximum=len(CHILDREN))

    def start(self, vocab_size: int) -> Tensor:
        """The matrix of candidates, int32 [vocab_size, k]; -1 where there is none."""
        return torch.full((vocab_size, self.k), -1, dtype=torch.int32)

    def propose(self, learned: Tensor, token: int) -> DraftTree:
        parents, levels = static_tree(self.k, self.depth)
        level, filled = torch.tensor([token]), []
        for above, rank in levels:
            of = level[above]
            level = torch.where(of >= 0, learned[of.clamp_min(0), rank].long(), -1)
            filled.append(level)
        tokens = torch.cat(filled)
        known = tokens >= 0
        index = torch.cat([torch.tensor([-1]), known.cumsum(0) - 1])
        return DraftTree(tokens[known], index[parents + 1][known])

    def learn(self, learned: Tensor, tokens: Tensor, logits: Tensor) -> None:
        """Of a token that stands in `tokens` more than once, the last gives its candidates."""
        best = logits.topk(min(self.k, logits.shape[1])).indices.to(learned)
        rows, which = torch.unique(tokens.to(learned.device), return_inverse=True)
        order = torch.arange(len(which), device=which.device)
        last = torch.zeros_like(rows).scatter_reduce(0, which, order, "amax")
        learned[rows, : best.shape[1]] = best[last]


@cache
def static_tree(k: int, depth: int) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
    """The static tree, cut to candidates below `k` and to `depth` levels.

    Returns:
        The parent of every node, -1 for the root, int64 [nodes]; and per level the parents of its
        nodes, counted within the level above, and their ranks among the parents' candidates,
        int64 [nodes of the level] each.
    """
    whole: list[tuple[int, ...]] = [()]  # a node is the path of ranks that leads to it
    above, first, parents, levels = whole, -1, [], []
    for counts in CHILDREN[:depth]:
        pairs = zip(whole, counts, strict=True)
        whole = [(*path, rank) for path, count in pairs for rank in range(count)]
        kept = [path for path in whole if max(path) < k]
        within = [above.index(path[:-1]) for path in kept]
        parents += [first + place for place in within]
        levels.append((torch.tensor(within), torch.tensor([path[-1] for path in kept])))
        first += len(above)
        above = kept
    return torch.tensor(parents), tuple(levels)
