"""The leading pages that sequences of a batch share, so that they can be read once for all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tamis.cache.batch import BatchView
from tamis.cache.format import PagedKV
from tamis.cache.layout import CacheLayout
from tamis.cache.pool import IntArray


class CommonPages(NamedTuple):
    """Sequences, int64 [m], that all begin with the same pages in every row without a window."""

    members: np.ndarray[tuple[int], np.dtype[np.int64]]
    n_pages: int


class CommonPrefix:
    """A batch's sequences, with what some of them begin with apart from what each has beyond it.

    A sequence is in one group at most. Layers with windows are not part of it.

    Attributes:
        groups: the sequences of each group, int64 on the device.
    """

    def __init__(self, view: BatchView, found: list[CommonPages]) -> None:
        self.groups = [torch.from_numpy(group.members).to(view.device) for group in found]
        self._view = view
        self._found = found
        n, _, width = view.tables.shape
        skipped = np.zeros(n, dtype=np.int32)
        for members, n_pages in found:
            skipped[members] = n_pages
        column = np.minimum(np.arange(width) + skipped[:, None], width - 1)
        tables = np.take_along_axis(view.tables, column[:, None], axis=2)
        lengths = view.lengths - skipped[:, None] * np.int32(view.layout.page_size)
        self._tables = torch.from_numpy(tables).to(view.device)
        self._lengths = torch.from_numpy(lengths).to(view.device)

    @classmethod
    def of(cls, view: BatchView, stop: int, least: int) -> CommonPrefix | None:
        """What the first `stop` sequences of a batch have in common, the step's tokens counted.

        Args:
            view: the batch.
            stop: how many sequences are looked at.
            least: the fewest tokens that a group must save, which are those that its sequences
                share, times one less than there are of them.

        Returns:
            None if nothing that they share is worth it.
        """
        found = worth_sharing(view.tables[:stop], view.lengths[:stop], view.layout, least)
        return cls(view, found) if found else None

    def shared(self, layer: int, group: int) -> PagedKV:
        """The pages that a group begins with at a layer without a window (n = 1)."""
        members, n_pages = self._found[group]
        first = int(members[0])
        pages = self._view.pages(layer, first, first + 1, with_new=True)
        length = n_pages * pages.format.page_size
        tables = pages.tables[..., :n_pages]
        return PagedKV(pages.data, pages.format, tables, torch.full_like(pages.lengths, length))

    def own(self, layer: int, stop: int) -> PagedKV:
        """What each of the first `stop` sequences has beyond it at a layer without a window."""
        rows = self._view.layout.rows(layer)
        pages = self._view.pages(layer, 0, stop, with_new=True)
        return PagedKV(
            pages.data, pages.format, self._tables[:stop, rows], self._lengths[:stop, rows]
        )


def worth_sharing(
    tables: IntArray, lengths: IntArray, layout: CacheLayout, least: int
) -> list[CommonPages]:
    """What the sequences of a batch have in common, as `CommonPrefix.of`; empty for nothing.

    Args:
        tables: page ids, int32 [n, rows, pages].
        lengths: tokens, int32 [n, rows].
        layout: of the rows.
        least: the fewest tokens that a group must save.
    """
    rows = np.setdiff1d(np.arange(tables.shape[1]), layout.window_rows)
    if len(tables) < 2 or not rows.size:
        return []
    tables, size = tables[:, rows], layout.page_size
    full = lengths[:, rows].min(axis=1) // size
    return [
        group
        for group in common_pages(tables, full)
        if (len(group.members) - 1) * group.n_pages * size >= least
    ]


def common_pages(tables: IntArray, full: IntArray) -> list[CommonPages]:
    """Group sequences by the pages that they begin with, each in one group at most.

    Where prefixes branch, a branch is a group of its own if that spares more pages from being read
    again than to share what is before the branch does; who is left over shares that.

    Args:
        tables: page ids, int32 [n, rows, pages].
        full: full pages of each sequence, in every row, int32 [n].

    Returns:
        Groups of two sequences or more.
    """
    groups = []
    for members, _ in _grouped(tables[:, 0], full, np.arange(len(tables)), 0).groups:
        alike = (tables[members] == tables[members[0]]).all(axis=(0, 1))
        n_pages = _run(alike, int(full[members].min()))
        if n_pages:
            groups.append(CommonPages(members, n_pages))
    return groups


class _Grouped(NamedTuple):
    """Groups, how many pages they spare from being read again, and who is in none."""

    groups: list[CommonPages]
    spared: int
    left: np.ndarray[tuple[int], np.dtype[np.int64]]


def _grouped(
    first_row: IntArray,
    full: IntArray,
    members: np.ndarray[tuple[int], np.dtype[np.int64]],
    start: int,
) -> _Grouped:
    """Group sequences that share `start` pages, by the pages of one row."""
    if len(members) < 2:
        return _Grouped([], 0, members)
    most = int(full[members].min())
    own = first_row[members, start:]
    n_pages = start + _run((own == own[0]).all(axis=0), most - start)
    longer = members[full[members] > n_pages]
    following = first_row[longer, n_pages] if len(longer) else longer
    groups, spared, pool = [], 0, [members[full[members] <= n_pages]]
    for page in np.unique(following):
        branch = _grouped(first_row, full, longer[following == page], n_pages + 1)
        in_groups = sum(len(group.members) for group in branch.groups)
        if branch.spared > in_groups * n_pages:
            groups += branch.groups
            spared += branch.spared
            pool.append(branch.left)
        else:
            pool.append(longer[following == page])
    left = np.sort(np.concatenate(pool))
    if len(left) < 2 or not n_pages:
        return _Grouped(groups, spared, left)
    groups.append(CommonPages(left, n_pages))
    return _Grouped(groups, spared + (len(left) - 1) * n_pages, left[:0])


def _run(alike: np.ndarray[tuple[int], np.dtype[np.bool_]], most: int) -> int:
    """How many of the first `most` are true before one is not."""
    different = np.flatnonzero(~alike[:most])
    return int(different[0]) if different.size else most
