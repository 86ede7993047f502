"""Which tokens move where when each head keeps some of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tamis.cache.pool import IntArray


def ragged_arange(counts: IntArray) -> IntArray:
    """0 .. count - 1 for each of the `counts`, one after the other, int32 [sum of counts]."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total, dtype=np.int32) - np.repeat((ends - counts).astype(np.int32), counts)


@dataclass(frozen=True)
class Compaction:
    """The moves that bring each head's kept tokens to the front, in order.

    Attributes:
        lengths: tokens that each head keeps, int32 [heads].
        first_page: the first page of each head that is written, int32 [heads]; the pages before
            it stay as they are. Equal to the number of pages kept where nothing moves.
        head, source, target: token `source` of `head` becomes its token `target`, int32 [moves];
            every token of a written page is among them.
    """

    lengths: IntArray
    first_page: IntArray
    head: IntArray
    source: IntArray
    target: IntArray


def plan_compaction(lengths: IntArray, indices: Sequence[IntArray], page_size: int) -> Compaction:
    """Plan the moves for keeping tokens `indices[h]` of each head `h`.

    Args:
        lengths: tokens cached per head, int32 [heads].
        indices: per head the tokens to keep, ascending, integers [kept]; may be empty.
        page_size: tokens per page.

    Raises:
        ValueError: not one array per head, or one that is not strictly ascending within
            0 .. length - 1.
    """
    if len(indices) != lengths.size:
        raise ValueError(f"keep needs indices for {lengths.size} heads, got {len(indices)}")
    kept = np.array([len(head) for head in indices], dtype=np.int32)
    source = np.concatenate([np.asarray(head, dtype=np.int32) for head in indices])
    target = ragged_arange(kept)
    head = np.repeat(np.arange(kept.size, dtype=np.int32), kept)
    steps = np.diff(source, prepend=np.int32(-1))
    ascending = np.where(target == 0, source >= 0, steps > 0)
    wrong = head[~ascending | (source >= lengths[head])]
    if wrong.size:
        raise ValueError(
            f"the indices to keep of head {wrong[0]} must ascend within "
            f"0 .. {lengths[wrong[0]] - 1}, got {np.asarray(indices[wrong[0]])}"
        )
    # Ascending indices equal their targets up to some token and exceed them from there on.
    unmoved = np.bincount(head[source == target], minlength=kept.size).astype(np.int32)
    first_page = np.where(unmoved < kept, unmoved // page_size, -(-kept // page_size))
    moves = target >= first_page[head] * page_size
    return Compaction(kept, first_page, head[moves], source[moves], target[moves])
