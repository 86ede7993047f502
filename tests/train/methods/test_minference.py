"""MInference's search: candidates of equal cost, and the one that loses least."""

import pytest
import torch

from tamis.attention import prefill
from tamis.methods.prefill.minference import MInference
from tamis.methods.prefill.patterns import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH
from tamis.methods.views import LayerShape, ModelShape
from tamis.model import load_model
from tamis.train.methods import minference
from tamis.train.methods.minference import CANDIDATES, PatternSearch, WholePrompt, at_cost
from tamis.train.methods.save import save
from tests.methods.chunk import chunk_view, visible_pairs

TOKENS, DIM = 512, 16


class Layers:
    """What the search reads of a model: one layer of 2 query heads on 1 KV head."""

    layers = (LayerShape(2, 1, DIM, DIM),)
    vocab_size, dtype = 16, torch.float32


def view_of(q, k, softcap=None, sinks=None):
    shape = ModelShape(Layers.layers, 16, torch.float32)
    return WholePrompt(0, shape, q, k, 0.25, softcap, sinks)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(TOKENS, heads, DIM, generator=generator) for heads in (2, 1, 1))


def search(q, k, v, keys=150):
    found = PatternSearch(Layers, keys, lambda layer: None)
    out = found(0, q, k, v, scale=0.25, window=None, softcap=None, sinks=None)
    dense, _ = prefill(q, k, v, None, scale=0.25, positions=torch.arange(len(q)))
    torch.testing.assert_close(out, dense)
    return found.kind[0].tolist(), found.size[0], found.error[0]


def test_its_view_is_the_chunk_view_of_the_definition():
    q, k, _ = tensors()
    view, naive = view_of(q, k), chunk_view(q, k.transpose(0, 1), scale=0.25)
    torch.testing.assert_close(view.window(40), naive.window(40))
    torch.testing.assert_close(view.pooled_queries(64), naive.pooled_queries(64))
    torch.testing.assert_close(view.pooled_keys(64), naive.pooled_keys(64))
    assert view.lengths.tolist() == naive.lengths.tolist()
    assert view.prompt_tokens == naive.prompt_tokens


def test_sinks_take_their_share_of_the_estimate():
    q, k, _ = tensors()
    sinks = torch.tensor([1.0, -1.0])
    scores = 0.25 * torch.einsum("qhd,kd->hqk", q[-3:], k[:, 0])
    scores = 2 * torch.tanh(scores / 2)
    for row in range(3):
        scores[:, row, TOKENS - 2 + row :] = -torch.inf
    expected = torch.cat([scores, sinks[:, None, None].expand(2, 3, 1)], -1).softmax(-1)
    torch.testing.assert_close(view_of(q, k, 2.0, sinks).window(3), expected[..., :-1])


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_every_candidate_costs_what_is_asked(candidate):
    q, k, _ = tensors(1)
    _, pattern = at_cost(view_of(q, k), candidate, 150)
    pairs = visible_pairs(pattern, chunk_view(q, k.transpose(0, 1)))
    cost = float(pairs.sum() / (2 * TOKENS))
    assert 100 < cost <= 150


def test_a_head_of_sinks_and_neighbours_is_a_shape_whatever_the_last_queries_read():
    _, _, v = tensors(2)
    angle = 2 * torch.pi * torch.arange(TOKENS) / 1024
    q, k = torch.zeros(TOKENS, 2, DIM), torch.zeros(TOKENS, 1, DIM)
    k[:, 0, :2] = torch.stack([angle.cos(), angle.sin()], 1)
    q[:, :, :2] = 40 * k[:, :, :2]  # so that a score is 10 cos(distance)
    k[30:34, :, 2], k[200:300, :, 3] = 1, 1
    q[:, :, 2] = 4 * 13  # four sinks weigh about as much as all neighbours
    q[-64:, :, 2], q[-64:, :, 3] = 0, 4 * 12
    kinds, _, _ = search(q, k, v)
    assert kinds == [A_SHAPE, A_SHAPE]


def test_a_head_of_scattered_columns_is_vertical_slash():
    q, k, v = tensors(3)
    chosen = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))[:25]
    q[:, :, 0], k[chosen, :, 0] = 10, 10
    kinds, size, error = search(q, k, v)
    assert kinds == [VERTICAL_SLASH, VERTICAL_SLASH]
    assert error.max() < 0.01
    assert size.shape == (2, 2)


def test_a_head_that_reads_blocks_of_its_own_choice_is_block_sparse():
    generator = torch.Generator().manual_seed(4)
    topics = torch.randint(8, (TOKENS // 64,), generator=generator).repeat_interleave(64)
    codes = 12 * torch.eye(DIM)[topics]
    q = codes[:, None].repeat(1, 2, 1)
    k = codes.roll(64, 0)[:, None] + 0.1 * torch.randn(TOKENS, 1, DIM, generator=generator)
    v = torch.randn(TOKENS, 1, DIM, generator=generator)
    kinds, _, _ = search(q, k, v)
    assert kinds == [BLOCK_SPARSE, BLOCK_SPARSE]


def test_the_method_runs_with_what_was_found(tiny_dir, tmp_path):
    model = load_model(tiny_dir("gemma3"), dtype="fp32", device="cpu")
    layers = []
    ids = torch.randint(256, (400,), generator=torch.Generator().manual_seed(5))
    found = minference.fit(model, ids, keys=120, report=layers.append)
    assert layers == [0, 1, 2]
    assert found.kind.shape == (3, 4)
    assert (found.size[1].sum(-1) > 0).all()
    assert not found.size[[0, 2]].any()  # layers with a sliding window
    save({"kind": found.kind, "size": found.size}, tmp_path / "tamis", "minference", {"keys": 120})
    shape = ModelShape(
        tuple(LayerShape(4, 2, 16, 16, one.window) for one in model.layers),
        model.vocab_size,
        model.dtype,
        tmp_path,
    )
    q, k = torch.randn(400, 4, 16), torch.randn(2, 400, 16)
    assert MInference().pattern(chunk_view(q, k, layer=1, shape=shape)) is not None
    assert MInference().pattern(chunk_view(q, k, layer=0, shape=shape)) is None
