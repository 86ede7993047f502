"""What sequences of a batch begin with is found by their pages, and taken apart without loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.attention.reference import gather
from tamis.cache import (
    BatchView,
    CacheLayout,
    CommonPrefix,
    LayerShape,
    PagedCache,
    PagedKV,
    PrefixTree,
)
from tamis.cache.common import common_pages
from tests.cache import tokens

PAGE = 4


def tables_of(*sequences: str) -> tuple[np.ndarray, np.ndarray]:
    """Tables of two rows for sequences given by a letter per page; equal beginnings share pages."""
    ids: dict[str, int] = {}
    width = max(map(len, sequences))
    table = np.zeros((len(sequences), 2, width), dtype=np.int32)
    for i, letters in enumerate(sequences):
        for page in range(len(letters)):
            prefix = letters[: page + 1]
            table[i, :, page] = ids.setdefault(prefix, 2 * len(ids)) + np.arange(2)
    return table, np.array([len(letters) for letters in sequences], dtype=np.int32)


def groups(*sequences: str) -> list[tuple[list[int], int]]:
    found = common_pages(*tables_of(*sequences))
    return sorted((group.members.tolist(), group.n_pages) for group in found)


def test_sequences_that_share_nothing_are_in_no_group() -> None:
    assert groups("abc", "def", "g") == []
    assert groups("abc") == []


def test_the_shared_pages_end_where_the_first_differs_or_ends() -> None:
    assert groups("abcd", "abce", "abc") == [([0, 1, 2], 3)]


def test_a_branch_that_spares_more_is_a_group_of_its_own() -> None:
    """Two documents behind one short instruction."""
    assert groups("sAAAA1", "sBBBB1", "sAAAA2", "sBBBB2") == [([0, 2], 5), ([1, 3], 5)]


def test_a_branch_that_spares_less_stays_with_the_others() -> None:
    assert groups("aaaax1", "aaaax2", "aaaay", "aaaaz") == [([0, 1, 2, 3], 4)]


def test_who_is_left_over_shares_what_is_before_the_branch() -> None:
    found = groups("saaaaaa1", "saaaaaa2", "sb", "sc")
    assert found == [([0, 1], 7), ([2, 3], 1)]


def test_a_row_that_shares_less_shortens_the_group() -> None:
    table, full = tables_of("abcd", "abce")
    table[1, 1, 1] = 99
    [group] = common_pages(table, full)
    assert group.n_pages == 1


def spared(found: list[tuple[list[int], int]]) -> int:
    return sum((len(members) - 1) * n for members, n in found)


@pytest.mark.parametrize("seed", range(30))
def test_groups_are_disjoint_shared_and_spare_as_much_as_one_group_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    letters = ["".join(rng.choice(list("ab"), rng.integers(1, 9))) for _ in range(7)]
    found = groups(*letters)
    grouped = [i for members, _ in found for i in members]
    assert len(set(grouped)) == len(grouped)
    for members, n in found:
        assert len({letters[i][:n] for i in members}) == 1
    for prefix in {word[: n + 1] for word in letters for n in range(len(word))}:
        alike = [i for i, word in enumerate(letters) if word.startswith(prefix)]
        assert spared(found) >= (len(alike) - 1) * len(prefix)


# --- in a batch -----------------------------------------------------------------------------------

LAYERS = (
    LayerShape(1, k_dim=8, v_dim=8, window=6),
    LayerShape(2, k_dim=8, v_dim=8),
)


def batch(shared: int, n: int) -> tuple[BatchView, list[list[int]]]:
    """A step of one token each of sequences that began with one prefix and then grew apart."""
    cache = PagedCache(CacheLayout(LAYERS, PAGE, torch.float32), 400_000)
    tree, first = PrefixTree(cache), cache.new_sequence()
    tokens.grow(first, list(range(shared)))
    block = tree.extend(None, range(shared), first)
    assert block is not None
    sequences, contents = [first], [list(range(shared))]
    for _ in range(1, n):
        sequences.append(tree.begin(block))
        contents.append(list(range(block.depth * PAGE)))
    for i, (sequence, mine) in enumerate(zip(sequences, contents, strict=True)):
        new = [100 * (i + 1) + j for j in range(i + 2)]
        tokens.grow(sequence, new)
        sequence.reserve(1)
        mine += [*new, 1000 + i]
    positions = torch.tensor([s.next_position for s in sequences], dtype=torch.int32)
    view = BatchView(cache, sequences, [1] * n, positions)
    serials = [1000 + i for i in range(n)]
    for layer, shape in enumerate(LAYERS):
        rows = range(cache.layout.rows(layer).start, cache.layout.rows(layer).stop)
        k = torch.stack([tokens.keys(serials, row, 8) for row in rows], dim=1)
        view.append(layer, k, -k[..., : shape.v_dim])
    return view, contents


def read(pages: PagedKV, n: int, head: int) -> torch.Tensor:
    """The keys that a head of a sequence reads, [tokens, 8]."""
    return gather(pages, "k", 0, int(pages.lengths[n, head]))[n, head]


def test_the_shared_and_the_own_part_are_all_of_a_sequence() -> None:
    view, contents = batch(shared=12, n=3)
    common = CommonPrefix.of(view, 3, least=2 * 12)
    assert common is not None
    assert [members.tolist() for members in common.groups] == [[0, 1, 2]]
    for head in range(2):
        row = view.layout.rows(1).start + head
        shared = read(common.shared(1, 0), 0, head)
        assert len(shared) == 12
        for i, serials in enumerate(contents):
            own = read(common.own(1, 3), i, head)
            assert torch.cat([shared, own]).equal(tokens.keys(serials, row, 8))


def test_what_spares_too_little_is_left_alone() -> None:
    view, _ = batch(shared=12, n=3)
    assert CommonPrefix.of(view, 3, least=2 * 12 + 1) is None
    assert CommonPrefix.of(view, 2, least=12 + 1) is None
    assert CommonPrefix.of(view, 1, least=0) is None
