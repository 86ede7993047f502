"""Token Recycling proposes what the model once ranked high after the same tokens."""

from __future__ import annotations

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.draft.tokenrecycling import CHILDREN, TokenRecycling
from tamis.methods.views import DraftTree

VOCAB = 50


def filled(method: TokenRecycling, seed: int, seen: int = VOCAB) -> torch.Tensor:
    """A matrix in which the first `seen` tokens have candidates."""
    torch.manual_seed(seed)
    learned = method.start(VOCAB)
    method.learn(learned, torch.arange(seen), torch.randn(seen, VOCAB))
    return learned


def expected_paths(
    learned: torch.Tensor, token: int, k: int = 8, depth: int = 6
) -> list[tuple[int, ...]]:
    """Breadth-first search: the token sequences of all nodes that have a token."""
    ranks: list[tuple[int, ...]] = [()]
    result = []
    for counts in CHILDREN[:depth]:
        ranks = [(*path, rank) for path, n in zip(ranks, counts, strict=True) for rank in range(n)]
        for path in ranks:
            walk, tokens = token, []
            for rank in path:
                walk = int(learned[walk, rank]) if walk >= 0 and rank < k else -1
                tokens.append(walk)
            if -1 not in tokens:
                result.append(tuple(tokens))
    return result


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    result: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        assert parent < len(result), "each parent comes before its children"
        result.append((*(result[parent] if parent >= 0 else ()), token))
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k", "depth"), [(8, 6), (3, 6), (8, 2), (1, 4), (5, 1)])
def test_the_tree_is_the_breadth_first_search_of_the_matrix(seed: int, k: int, depth: int) -> None:
    method = TokenRecycling(k=k, depth=depth)
    learned = filled(method, seed, seen=30)  # candidates from 30 on have no children
    for token in range(0, VOCAB, 7):
        assert paths(method.propose(learned, token)) == expected_paths(learned, token, k, depth)


def test_the_whole_tree_has_the_papers_size() -> None:
    method = TokenRecycling()
    tree = method.propose(filled(method, 0), 0)
    assert len(tree.tokens) == 80
    assert max(map(len, paths(tree))) == 6
    assert tree.tokens.dtype == tree.parents.dtype == torch.long


def test_one_candidate_gives_a_chain() -> None:
    method = TokenRecycling(k=1)
    tree = method.propose(filled(method, 0), 0)
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]


def test_nothing_is_proposed_before_anything_was_seen() -> None:
    method = TokenRecycling()
    tree = method.propose(method.start(VOCAB), 7)
    assert tree.tokens.tolist() == tree.parents.tolist() == []


def test_candidates_are_the_best_of_the_last_logits() -> None:
    method = TokenRecycling()
    learned = method.start(VOCAB)
    torch.manual_seed(0)
    logits = torch.randn(5, VOCAB)
    method.learn(learned, torch.tensor([3, 9, 3, 9, 3]), logits)
    for token, row in ((9, 3), (3, 4)):
        order = sorted(range(VOCAB), key=lambda i: -float(logits[row, i]))
        assert learned[token].tolist() == order[:8]
    assert (learned[[0, 1, 2, 4]] == -1).all()
    method.learn(learned, torch.tensor([3]), logits[:1])
    assert learned[3, 0] == logits[0].argmax()
    assert learned[9, 0] == logits[3].argmax()


def test_a_vocabulary_smaller_than_the_candidates_works() -> None:
    method = TokenRecycling()
    learned = method.start(3)
    method.learn(learned, torch.tensor([0]), torch.tensor([[0.0, 2.0, 1.0]]))
    assert method.propose(learned, 0).tokens.tolist() == [1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 9}, {"depth": 0}, {"depth": 7}])
def test_parameters_out_of_range_are_plan_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(PlanError):
        TokenRecycling(**wrong)
