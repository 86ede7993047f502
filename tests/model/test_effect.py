"""`measure` sees the hidden states before and after each layer's attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tamis.model import Model, RowRanges, load_model
from tests.model.naive import NaiveAttend
from tests.tiny_models import VOCAB

N = 12
ROWS = torch.arange(N)

MLP_INPUT_NORM = {
    "llama": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "granite": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "gpt-oss": "post_attention_layernorm",
    "phi3": "post_attention_layernorm",
}
"""Where the model itself takes up the hidden states after attention, to feed its MLP."""


def run(model: Model, rows: RowRanges | None = None) -> list[tuple[int, Tensor, Tensor]]:
    seen: list[tuple[int, Tensor, Tensor]] = []
    attend = NaiveAttend()
    attend.owners, attend.positions = [0] * N, ROWS.tolist()
    ids = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(2))
    at = ROWS[:0]

    def measure(layer: int, before: Tensor, after: Tensor) -> None:
        seen.append((layer, before.clone(), after.clone()))

    if rows is None:
        model.forward(ids, ROWS, at, attend, measure=measure)
    else:
        model.forward(ids, ROWS, at, attend, rows=rows, measure=measure)
    return seen


@pytest.mark.parametrize("name", MLP_INPUT_NORM)
def test_after_is_what_the_model_itself_goes_on_with(name, tiny_dir):
    model = load_model(tiny_dir(name), dtype="fp32", device="cpu")
    assert len(model.decoder_layers) == 3  # found by a forward of its own, before the hooks here
    inputs: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].clone()))
        for path, module in model.hf.named_modules()
        if path.endswith(MLP_INPUT_NORM[name])
    ]
    seen = run(model)
    for hook in hooks:
        hook.remove()
    assert [layer for layer, _, _ in seen] == [0, 1, 2]
    for (_, before, after), expected in zip(seen, inputs, strict=True):
        torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt-neox", "cohere"])
def test_parallel_layers_add_the_output_of_attention(name, tiny_dir):
    model = load_model(tiny_dir(name), dtype="fp32", device="cpu")
    assert len(model.decoder_layers) == 3  # found by a forward of its own, before the hooks here
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: tuple) -> None:
        outputs.append(output[0][0].clone())

    hooks = [module.register_forward_hook(keep) for module in model.attention_modules]
    seen = run(model)
    for hook in hooks:
        hook.remove()
    for (_, before, after), output in zip(seen, outputs, strict=True):
        torch.testing.assert_close(after, before + output)


def test_the_rows_measured_are_those_of_the_layer(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")

    class FewRows(NaiveAttend):
        def __call__(self, layer: int, q: Tensor, *rest, **how) -> Tensor:
            self.owners, self.positions = [0] * len(q), list(range(len(q)))
            return super().__call__(layer, q, *rest, **how)

    ids = torch.arange(N)
    rows = RowRanges(torch.zeros_like(ROWS), torch.where(ROWS < 5, 1, 0))
    seen: list[tuple[int, int]] = []
    model.forward(
        ids,
        ROWS,
        ROWS[:0],
        FewRows(),
        rows=rows,
        measure=lambda layer, before, after: seen.append((layer, len(before))),
    )
    assert seen == [(0, N), (1, 5)]


def test_a_forward_leaves_no_hook_behind(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    run(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
