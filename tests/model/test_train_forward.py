"""Gradients flow through the model to what an attention learns, and to nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.model import Model, load_model
from tests.model.naive import NaiveAttend
from tests.tiny_models import CONFIGS, VOCAB

N = 20
ROWS = torch.arange(N)


class GatedAttend(NaiveAttend):
    """Naive attention times one gate per layer and query head."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = gates  # [layers, q_heads]
        self.owners, self.positions = [0] * N, ROWS.tolist()

    def __call__(self, layer: int, *qkv: Tensor, **how) -> Tensor:
        return super().__call__(layer, *qkv, **how) * self.gates[layer][:, None]


def arguments(model: Model) -> tuple[Tensor, Tensor, Tensor | None]:
    ids = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(3))
    return ids, ROWS, torch.full_like(ROWS, N) if model.dynamic_rope else None


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, tiny_dir) -> Model:
    return load_model(tiny_dir(request.param), dtype="fp32", device="cpu")


@pytest.fixture
def llama(tiny_dir) -> Model:
    return load_model(tiny_dir("llama"), dtype="fp32", device="cpu")


def test_the_logits_are_those_of_forward_and_every_gate_has_a_gradient(model):
    gates = torch.ones(3, 4, requires_grad=True)
    ids, at, lengths = arguments(model)
    rows = torch.tensor([N - 1, 4])
    logits = model.train_forward(ids, at, rows, GatedAttend(gates), lengths)
    expected = model.forward(ids, at, rows, GatedAttend(gates), lengths)
    torch.testing.assert_close(logits.detach(), expected, atol=1e-5, rtol=0)
    assert not expected.requires_grad
    logits.logsumexp(-1).sum().backward()
    assert gates.grad is not None
    assert bool((gates.grad != 0).all())
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_the_gradient_is_the_slope_of_the_loss(llama):
    ids, at, _ = arguments(llama)

    def loss(gates: Tensor) -> Tensor:
        return llama.train_forward(ids, at, ROWS[-1:], GatedAttend(gates)).logsumexp(-1).sum()

    gates = torch.full((3, 4), 0.7, requires_grad=True)
    loss(gates).backward()
    step = torch.zeros(3, 4)
    step[1, 2] = 1e-2
    slope = (loss(gates.detach() + step) - loss(gates.detach() - step)) / 2e-2
    torch.testing.assert_close(gates.grad[1, 2], slope, atol=1e-3, rtol=2e-2)


def test_hidden_states_are_what_the_output_projection_gets(model):
    ids, at, lengths = arguments(model)
    gates = torch.ones(3, 4, requires_grad=True)
    seen: list[Tensor] = []
    head = model.hf.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])):
        model.forward(ids, at, ROWS, GatedAttend(gates), lengths)
    hidden = model.train_forward(ids, at, ROWS[:1], GatedAttend(gates), lengths, hidden=True)
    assert hidden.shape == (N, 64)
    torch.testing.assert_close(hidden.detach(), seen[0], atol=1e-5, rtol=1e-5)
    hidden.square().sum().backward()
    assert bool((gates.grad != 0).all())


def test_disagreeing_shapes_are_an_error(llama):
    with pytest.raises(ValueError, match=r"must be \[tokens\]"):
        llama.train_forward(ROWS, ROWS[:2], ROWS[:1], GatedAttend(torch.ones(3, 4)))
