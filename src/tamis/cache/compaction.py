"""Which tokens move where when rows keep some of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tamis.cache.pool import IntArray, ragged_arange


@dataclass(frozen=True)
class Compaction:
    """The moves that bring each head's kept tokens to the front, in order.

    Attributes:
        lengths: tokens that each head keeps, int32 [heads].
        first_page: the first page of each head that is written, int32 [heads]; the pages before
            it stay as they are. Equal to the number of pages kept where nothing moves.
        head, source, target: token `source` of `head` becomes its token `target`, int32 [moves].
        first_changed: the first page of each head whose tokens are not what they were, int32
            [heads]: the pages kept if none is. A page cut short counts as changed.
    """

    lengths: IntArray
    first_page: IntArray
    head: IntArray
    source: IntArray
    target: IntArray
    first_changed: IntArray


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
    moves = source != target
    changed = _first_changed(lengths, kept, first_page, page_size)
    return Compaction(kept, first_page, head[moves], source[moves], target[moves], changed)


def plan_retraction(lengths: IntArray, n: int, kept: Sequence[int], page_size: int) -> Compaction:
    """Plan the moves for keeping, of the last `n` tokens of each row, those at offsets `kept`.

    The work depends on `n` and the number of rows, not on the lengths.

    Args:
        lengths: tokens cached per row, int32 [rows].
        n: how many tokens at the end of each row are in question.
        kept: ascending offsets within 0 .. n - 1.
        page_size: tokens per page.

    Raises:
        ValueError: a row has fewer than `n` tokens, or `kept` does not ascend within 0 .. n - 1.
    """
    if not 0 <= n <= lengths.min():
        raise ValueError(f"{n} tokens retracted of a row with {lengths.min()}")
    offsets = np.array(kept, dtype=np.int32)
    if offsets.size and (offsets[0] < 0 or offsets[-1] >= n or (np.diff(offsets) <= 0).any()):
        raise ValueError(f"the offsets to keep must ascend within 0 .. {n - 1}, got {list(kept)}")
    targets = np.arange(offsets.size, dtype=np.int32)
    moves = offsets != targets
    base = lengths - np.int32(n)
    left = base + np.int32(offsets.size)
    pages_kept = -(-left // page_size)
    first_move = int(np.count_nonzero(~moves))  # ascending offsets: the first ones stay
    first_page = (base + first_move) // page_size if moves.any() else pages_kept
    return Compaction(
        left,
        first_page,
        np.repeat(np.arange(lengths.size, dtype=np.int32), np.count_nonzero(moves)),
        (base[:, None] + offsets[moves]).ravel(),
        (base[:, None] + targets[moves]).ravel(),
        _first_changed(lengths, left, first_page, page_size),
    )


def _first_changed(
    before: IntArray, after: IntArray, first_page: IntArray, page_size: int
) -> IntArray:
    """`Compaction.first_changed` from the lengths before and after."""
    cut = np.where(after < before, after // page_size, -(-after // page_size))
    return np.minimum(first_page, cut)
