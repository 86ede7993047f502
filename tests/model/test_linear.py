"""Linear layers of a few rows: the right sums, whatever the shape, the machine and the company."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from tamis.model import linear as layers
from tamis.model import load_model
from tamis.model.linear import FEW_ROWS, linear, max_rows, small_batches
from tests.instruction_sets import isas

HALVES = (torch.bfloat16, torch.float16)
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance of neighbours just above 1: the most that one rounding changes them."""


def operands(rows: int, width: int, out: int, dtype: torch.dtype = torch.bfloat16):
    """x [rows, width], weight [out, width], bias [out]: normal, from a fixed seed."""
    made = torch.Generator().manual_seed(rows * 7 + width * 3 + out)
    return tuple(
        torch.randn(shape, generator=made).to(dtype) for shape in ((rows, width), (out, width), out)
    )


def exact(x, weight, bias=None) -> torch.Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_rounded_once(y, x, weight, bias=None) -> None:
    """`y` is the exact sum, off by one rounding and by what fp32 loses while adding."""
    wanted = exact(x, weight, bias)
    added = exact(x.abs(), weight.abs(), bias.abs() if bias is not None else None)
    allowed = EPS[y.dtype] * wanted.abs() + 2.0**-20 * added + 2.0**-24
    assert ((y.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [*range(1, FEW_ROWS + 1), 67])
def test_sums_are_exact_but_for_one_rounding(extension, isa, dtype, rows):
    x, weight, bias = operands(rows, 136, 40, dtype)
    assert_rounded_once(linear(extension, x, weight, bias, isa=isa), x, weight, bias)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("width", "out"), [(1, 1), (31, 17), (33, 15), (67, 3), (129, 101)])
def test_widths_need_not_fill_vectors(extension, isa, dtype, width, out):
    for rows in (1, 2, 3, 7):
        x, weight, bias = operands(rows, width, out, dtype)
        assert_rounded_once(linear(extension, x, weight, isa=isa), x, weight)
        assert_rounded_once(linear(extension, x, weight, bias, isa=isa), x, weight, bias)


def test_rows_may_lie_anywhere(extension):
    _, weight, bias = operands(1, 96, 40)
    wide, _, _ = operands(8, 200, 1)
    tall, _, _ = operands(96, 6, 1)
    for x in (wide[::2, 50:146], wide[:1, 3:99], tall.T, wide[:, 4:100].view(2, 4, 96)):
        y = linear(extension, x, weight, bias)
        assert y.shape == (*x.shape[:-1], 40)
        assert torch.equal(y, linear(extension, x.clone().contiguous(), weight, bias))


@pytest.mark.parametrize("isa", isas())
def test_a_row_does_not_see_the_others(extension, isa):
    x, weight, bias = operands(FEW_ROWS, 300, 70)
    together = linear(extension, x, weight, bias, isa=isa)
    for first in range(FEW_ROWS):
        for rows in (1, 2, 3, 5):
            part = x[first : first + rows]
            alone = linear(extension, part, weight, bias, isa=isa)
            assert torch.equal(alone, together[first : first + rows])


def test_threads_do_not_change_the_bits(extension):
    x, weight, bias = operands(3, 512, 213)  # beyond the size from which threads share the work
    one = linear(extension, x, weight, bias)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(linear(extension, x, weight, bias), one)
    finally:
        torch.set_num_threads(before)


def calls_of_the_kernel(monkeypatch) -> list[int]:
    """Rows of each call of the kernel from now on."""
    calls: list[int] = []

    def counted(extension, x, *rest):
        calls.append(x.numel() // x.shape[-1])
        return linear(extension, x, *rest)

    monkeypatch.setattr(layers, "linear", counted)
    return calls


@torch.no_grad()
def test_few_rows_meet_the_kernel_and_many_torch(extension, monkeypatch):
    module = nn.Linear(64, 48, dtype=torch.bfloat16)
    plain = deepcopy(module)
    small_batches(module)
    calls = calls_of_the_kernel(monkeypatch)
    most = max_rows(torch.bfloat16)
    for rows in (1, most, most + 1, most + 100):
        x, _, _ = operands(rows, 64, 1)
        assert_rounded_once(module(x[None])[0], x, module.weight, module.bias)
        if rows > most:
            assert torch.equal(module(x), plain(x))
    assert calls == [1, most]
    assert module(x[:0]).shape == (0, 48)


def test_gradients_go_torchs_way(extension, monkeypatch):
    module = nn.Linear(64, 48, dtype=torch.bfloat16)
    small_batches(module)
    calls = calls_of_the_kernel(monkeypatch)
    x, _, _ = operands(2, 64, 1)
    module(x).sum().backward()
    assert torch.equal(module.weight.grad, x.sum(0).expand(48, 64))
    assert calls == []


@torch.no_grad()
def test_a_copy_multiplies_its_own_weights(extension):
    module = nn.Linear(64, 48, dtype=torch.bfloat16)
    small_batches(module)
    copy = deepcopy(module)
    copy.weight.zero_()
    x, _, _ = operands(1, 64, 1)
    assert torch.equal(copy(x)[0], copy.bias)
    assert not torch.equal(module(x)[0], module.bias)


@torch.no_grad()
def test_a_layer_that_is_converted_later_runs_on(extension):
    module = nn.Linear(64, 48, dtype=torch.bfloat16)
    small_batches(module)
    x, _, _ = operands(1, 64, 1)
    module.float()
    assert module(x.float()).dtype == torch.float32
    with pytest.raises(RuntimeError):
        module(x)
    with pytest.raises(RuntimeError):
        module.bfloat16()(x[:, :32])


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_only_plain_layers_in_half_precision_change(extension, monkeypatch):
    half, full = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8)
    network = nn.ModuleList([half, full, Doubled(8, 8, dtype=torch.bfloat16)])
    small_batches(network)
    assert [("forward" in module.__dict__) for module in network] == [True, False, False]
    monkeypatch.setenv("TAMIS_BACKEND", "reference")
    other = nn.Linear(8, 8, dtype=torch.bfloat16)
    small_batches(other)
    assert "forward" not in other.__dict__


@pytest.mark.parametrize(("dtype", "changed"), [("bf16", True), ("fp32", False)])
def test_loaded_models_have_the_kernel_where_it_serves(extension, tiny_dir, dtype, changed):
    model = load_model(tiny_dir("llama"), dtype=dtype, device="cpu")
    plain = [module for module in model.hf.modules() if type(module) is nn.Linear]
    assert plain
    assert all(("forward" in module.__dict__) == changed for module in plain)
