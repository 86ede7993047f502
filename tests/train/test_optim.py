"""Muon's update against a singular value decomposition."""

import pytest
import torch

from tamis.train.model import build_model
from tamis.train.optim import Muon, orthogonalized, split_parameters
from tamis.train.recipe import Shape


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_updates_have_the_singular_vectors_of_the_gradient_and_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for matrix, update in zip(matrices, orthogonalized(matrices), strict=True):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        in_basis = u.T @ update @ vt.T
        strong = s > 0.1 * s.max()
        values = in_basis.diagonal()[strong]
        assert ((values > 0.6) & (values < 1.3)).all()
        assert (in_basis - in_basis.diagonal().diag()).abs().max() < 0.1


def test_a_step_moves_weights_by_the_learning_rate_along_the_update():
    weight = torch.nn.Parameter(torch.zeros(32, 8))
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    weight.grad = grad.clone()
    optimizer.step()
    nesterov = grad.lerp(0.1 * grad, 0.9)
    expected = -0.1 * (32 / 8) ** 0.5 * orthogonalized(nesterov[None])[0]
    torch.testing.assert_close(weight.data, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], 0.1 * grad)


def test_only_the_matrices_inside_layers_go_to_muon(tokenizer):
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, feed_forward=48)
    model = build_model(shape, tokenizer, seed=0)
    matrices, others = split_parameters(model)
    assert len(matrices) == 2 * 7
    assert any(parameter is model.model.embed_tokens.weight for parameter in others)
    assert len(matrices) + len(others) == len(list(model.parameters()))
