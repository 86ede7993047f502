"""Layers by the kernels compute what the layers' own modules compute."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tamis.model import Model, load_model
from tamis.model.fused import FusedLayer
from tamis.model.linear import max_rows
from tamis.model.rows import RowRanges
from tests.tiny_models import CONFIGS

SERVED = {"qwen2", "qwen3", "mistral"} | {name for name in CONFIGS if name.startswith("llama")}
"""Models of tiny_models whose layers are Llama's, with biases, norms of heads, or a window."""


pytestmark = pytest.mark.usefixtures("extension")


class Causal:
    """An `Attend` in which every token sees the tokens before it; notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls.append((q, k, v, options))
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1))
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        weights = (scores * options["scale"]).masked_fill(future, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v.float().repeat_interleave(group, 1))
        return out.to(q.dtype)


def run(model: Model, n: int, attend: Any = None, **options: Any) -> Any:
    ids = torch.arange(n) * 7 % model.vocab_size
    return model.forward(ids, torch.arange(n) + 5, torch.arange(n), attend or Causal(), **options)


def quick(model: Model) -> list[FusedLayer | None]:
    """The layers' forwards by the kernels."""
    return [layer.__dict__.get("forward") for layer in model.decoder_layers]


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[int]]:
    """The rows of every call that the kernels take."""
    found: list[int] = []
    own = FusedLayer.run

    def counted(self: FusedLayer, x: Tensor, *rest: Any) -> Tensor:
        found.append(x.shape[1])
        return own(self, x, *rest)

    monkeypatch.setattr(FusedLayer, "run", counted)
    return found


def plain(model: Model) -> Model:
    """A copy whose layers all go their own way."""
    copy = deepcopy(model)
    for layer in copy.decoder_layers:
        layer.__dict__.pop("forward", None)
    return copy


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_served_where_their_layers_are_llamas(tiny_dir, name):
    model = load_model(tiny_dir(name), dtype="bf16", device="cpu")
    assert {forward is not None for forward in quick(model)} == {name in SERVED}


@pytest.mark.parametrize("name", sorted(SERVED))
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_few_and_many_rows_give_the_layers_own_results(tiny_dir, name, dtype, calls):
    model = load_model(tiny_dir(name), dtype=dtype, device="cpu")
    del calls[:]  # those that the layers were tried with
    other, n_layers = plain(model), len(model.layers)
    most = max_rows(model.dtype)
    for n in (1, 2, 7, most, most + 1, most + 90):
        ours, theirs = Causal(), Causal()
        lengths = torch.full((n,), n + 5)
        logits = run(model, n, ours, rope_lengths=lengths)
        wanted = run(other, n, theirs, rope_lengths=lengths)
        assert calls == [n] * n_layers
        del calls[:]
        # bf16 rounds the first layer's q, k and v at the same places, and differs in sums alone.
        tolerance = 4e-2 if dtype == "bf16" else 6e-3
        for mine, own in zip(ours.calls[0][:3], theirs.calls[0][:3], strict=True):
            assert float((mine.float() - own.float()).norm()) <= tolerance * float(own.norm())
        assert [call[3] for call in ours.calls] == [call[3] for call in theirs.calls]
        assert float((logits - wanted).norm()) <= 2 * tolerance * float(wanted.norm())


def test_a_row_sees_neither_threads_nor_other_rows(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="bf16", device="cpu")
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    angles = torch.rand(1, 5, 16, generator=torch.Generator().manual_seed(2))
    places = (angles.cos().bfloat16(), angles.sin().bfloat16())

    def itself(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return q + k.repeat_interleave(2, 1) + v.repeat_interleave(2, 1)

    forward = quick(model)[0]
    assert forward is not None
    with torch.no_grad():
        together = forward.run(x, places, itself)
        for i in range(5):
            own = tuple(at[:, i : i + 1].contiguous() for at in places)
            alone = forward.run(x[:, i : i + 1].clone(), own, itself)
            assert torch.equal(alone[0, 0], together[0, i])
        before = torch.get_num_threads()
        try:
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                assert torch.equal(forward.run(x, places, itself), together)
        finally:
            torch.set_num_threads(before)


def test_gradients_and_hooks_take_the_layers_own_way(tiny_dir, calls):
    model = load_model(tiny_dir("llama"), dtype="bf16", device="cpu")
    n_layers = len(model.layers)
    del calls[:]
    at = torch.arange(2)
    model.train_forward(at, at, at, Causal())
    assert calls == []
    measured: list[int] = []
    run(model, 2, measure=lambda layer, before, after: measured.append(layer))
    assert measured == list(range(n_layers))
    assert calls == []
    run(model, 2)
    assert calls == [2] * n_layers


def test_rows_that_leave_early_are_not_computed(tiny_dir, calls):
    model = load_model(tiny_dir("llama"), dtype="bf16", device="cpu")
    last = len(model.layers) - 1
    del calls[:]
    rows = RowRanges(torch.tensor([0, 0, 0]), torch.tensor([0, last, last]), None)
    ids = torch.arange(3)
    model.forward(ids, ids, ids[1:], Causal(), rows=rows)
    assert calls == [3] + [2] * last


def test_a_layer_that_computes_something_else_keeps_its_own_way(tiny_dir, monkeypatch):
    class Scaled(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * super().forward(x)

    from transformers.models.llama import modeling_llama

    monkeypatch.setitem(modeling_llama.ACT2FN, "silu", Scaled)
    model = load_model(tiny_dir("llama"), dtype="bf16", device="cpu")
    assert quick(model) == [None] * len(model.layers)


def test_a_copy_multiplies_its_own_weights(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="bf16", device="cpu")
    before = run(model, 2)
    copy = deepcopy(model)
    for layer in copy.decoder_layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert not torch.equal(run(copy, 2), before)
    assert torch.equal(run(model, 2), before)


def test_full_precision_keeps_torch(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    assert quick(model) == [None] * len(model.layers)
