"""MInference computes, per head, the pattern that was found for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tamis.errors import PlanError
from tamis.methods.prefill import patterns
from tamis.methods.prefill.minference import MInference
from tamis.methods.prefill.patterns import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, head_patterns
from tamis.methods.views import LayerShape, ModelShape
from tests.methods.chunk import NaiveChunkView, chunk_view, visible_pairs
from tests.methods.prefill.random_chunk import largest, lines, past_of, random_chunk

BLOCK, LAST_Q = 4, 5


@pytest.fixture(autouse=True)
def small_minimums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that vertical-slash heads always have, as small as the maps here."""
    monkeypatch.setattr(patterns, "LEAST_VERTICALS", 2)
    monkeypatch.setattr(patterns, "LEAST_SLASHES", 3)
    monkeypatch.setattr(patterns, "FIRST_KEYS", 1)
    monkeypatch.setattr(patterns, "LAST_OFFSETS", 2)


def expected_pairs(
    view: NaiveChunkView, head: int, kind: int, first: int, second: int
) -> torch.Tensor:
    """The pairs of one head by the paper's description, bool [tokens, keys]."""
    past, tokens = past_of(view, head), len(view.q)
    keys = past + tokens
    own = [past + query for query in range(tokens)]
    pairs = torch.zeros(tokens, view.k.shape[1], dtype=torch.bool)
    if kind == A_SHAPE:
        for query, p in enumerate(own):
            for key in range(p + 1):
                pairs[query, key] = key < first or key > p - second
    elif kind == VERTICAL_SLASH and max(first, second) >= keys:
        for query, p in enumerate(own):
            pairs[query, : p + 1] = True
    elif kind == VERTICAL_SLASH:
        columns, diagonals = lines(view, head, LAST_Q)
        columns[0] = diagonals[0] = diagonals[1] = 1e9
        slashes = largest(diagonals, max(3, second))
        for key in largest(columns, max(2, first)):
            pairs[:, key] = True
        for start in range(0, tokens, BLOCK):
            block = own[start : start + BLOCK]
            touched = {(p - o) // BLOCK for p in block for o in slashes if o <= p}
            for index in touched:
                pairs[start : start + BLOCK, index * BLOCK : (index + 1) * BLOCK] = True
    else:
        k = view.k[head // (view.q.shape[1] // len(view.k)), :keys]
        for start in range(0, tokens, BLOCK):
            block = own[start : start + BLOCK]
            mean_q = view.q[start : start + BLOCK, head].mean(0)
            scores = [float(part.mean(0) @ mean_q) for part in k.split(BLOCK)]
            seen = range(block[-1] // BLOCK + 1)
            for index in largest(scores, first, seen) | {p // BLOCK for p in block}:
                pairs[start : start + BLOCK, index * BLOCK : (index + 1) * BLOCK] = True
    for query, p in enumerate(own):
        pairs[query, p + 1 :] = False
    return pairs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("tokens", "past"), [(24, (0, 0)), (21, (19, 19)), (18, (3, 22)), (1, (9, 30))]
)
def test_every_kind_computes_its_pairs(seed: int, tokens: int, past: tuple[int, ...]) -> None:
    view = random_chunk(seed, tokens, past, group=3)
    kind = torch.tensor([A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE, VERTICAL_SLASH, BLOCK_SPARSE, 0])
    size = torch.tensor([[2, 3], [3, 5], [2, 0], [1, 1], [1, 0], [0, 1]])
    pattern = head_patterns(view, kind, size, block=BLOCK, last_q=LAST_Q)
    assert pattern is not None
    pairs = visible_pairs(pattern, view)
    for head in range(6):
        expected = expected_pairs(view, head, int(kind[head]), *size[head].tolist())
        assert torch.equal(pairs[head], expected), f"head {head}"


@pytest.mark.parametrize(
    ("kind", "size"), [(A_SHAPE, (10, 20)), (1, (30, 1)), (1, (1, 30)), (2, (8, 0))]
)
def test_a_head_with_a_size_of_all_its_keys_computes_everything(
    kind: int, size: tuple[int, int]
) -> None:
    view = random_chunk(0, 20, (10, 4))
    kinds = torch.tensor([kind, kind, A_SHAPE, A_SHAPE])
    sizes = torch.tensor([size, size, (1, 2), (1, 2)])
    pattern = head_patterns(view, kinds, sizes, block=BLOCK)
    assert pattern is not None
    assert pattern.full is not None
    assert pattern.full.tolist() == [True, True, False, False]
    assert head_patterns(view, kinds[:1].expand(4), sizes[:1].expand(4, 2), block=BLOCK) is None


def test_lines_that_heads_always_have_are_no_more_than_there_are_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "LEAST_VERTICALS", 30)
    view = random_chunk(0, 6, (0, 20), group=1)
    kind = torch.tensor([VERTICAL_SLASH, VERTICAL_SLASH])
    pattern = head_patterns(view, kind, torch.tensor([[2, 2], [2, 2]]), block=BLOCK)
    assert pattern is not None
    assert pattern.columns.tolist() == [*range(6), *range(26)]


def test_without_a_file_every_head_is_vertical_slash() -> None:
    view = random_chunk(3, 24, (6, 6))
    method = MInference(verticals=2, slashes=4, last_q=LAST_Q, block=BLOCK)
    pattern = method.pattern(view)
    assert pattern is not None
    pairs = visible_pairs(pattern, view)
    for head in range(4):
        assert torch.equal(pairs[head], expected_pairs(view, head, VERTICAL_SLASH, 2, 4))


@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_chunks_within_the_sizes_are_computed_whole(tokens: int) -> None:
    assert MInference().pattern(random_chunk(0, tokens, (0, 0))) is None


def test_sliding_window_layers_are_left_alone() -> None:
    view = random_chunk(0, 24, (0, 0))
    shape = ModelShape((LayerShape(4, 2, 8, 8, window=8),), 16, torch.float32)
    method = MInference(verticals=2, slashes=4)
    assert method.pattern(chunk_view(view.q, view.k, shape=shape)) is None


def fitted(directory: Path, heads: int = 4) -> ModelShape:
    """Two layers whose heads are A-shape in the first and block-sparse in the second."""
    (directory / "tamis").mkdir()
    kind = torch.tensor([[A_SHAPE] * heads, [BLOCK_SPARSE] * heads])
    size = torch.tensor([[[1, 3]] * heads, [[2, 0]] * heads])
    save_file({"kind": kind, "size": size}, directory / "tamis" / "minference.safetensors")
    return ModelShape((LayerShape(4, 2, 8, 8),) * 2, 16, torch.float32, directory)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("given", [False, True])
def test_what_was_fitted_is_used(tmp_path: Path, layer: int, given: bool) -> None:
    shape = fitted(tmp_path)
    path = ""
    if given:
        path = str(tmp_path / "tamis" / "minference.safetensors")
        shape = ModelShape(shape.layers, shape.vocab_size, shape.dtype)
    view = random_chunk(0, 24, (6, 6))
    view = chunk_view(view.q, view.k, lengths=view.lengths, layer=layer, shape=shape)
    pattern = MInference(block=BLOCK, path=path).pattern(view)
    assert pattern is not None
    pairs = visible_pairs(pattern, view)
    sizes = (A_SHAPE, 1, 3) if layer == 0 else (BLOCK_SPARSE, 2, 0)
    for head in range(4):
        assert torch.equal(pairs[head], expected_pairs(view, head, *sizes))


def test_patterns_of_another_model_are_an_error(tmp_path: Path) -> None:
    shape = fitted(tmp_path, heads=3)
    view = random_chunk(0, 24, (0, 0))
    with pytest.raises(PlanError, match="another model"):
        MInference().pattern(chunk_view(view.q, view.k, shape=shape))


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "patterns.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError, match=r"patterns\.safetensors"):
        MInference(path=str(file)).pattern(random_chunk(0, 24, (0, 0)))


@pytest.mark.parametrize("wrong", [{"verticals": 0}, {"slashes": 0}, {"last_q": 0}, {"block": 0}])
def test_parameters_out_of_range_are_plan_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(PlanError):
        MInference(**wrong)
