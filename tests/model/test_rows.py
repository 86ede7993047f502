"""Rows run through the layers they are told to, whatever the other rows do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from tamis.errors import UnsupportedModelError
from tamis.model import Model, RowRanges, load_model
from tamis.model.interface import NAME, register
from tamis.model.layers import decoder_layers
from tests.model.naive import NaiveAttend
from tests.tiny_models import CONFIGS, VOCAB

N, LAYERS, HIDDEN = 60, 3, 64
LAST = LAYERS - 1
ROWS = torch.arange(N)
OWNER = ROWS % 3
"""Three sequences of 20 tokens, a token of each in turn."""
POSITIONS = ROWS // 3


class LayerwiseAttend(NaiveAttend):
    """Naive attention of the rows of each layer."""

    def __init__(self, rows: RowRanges) -> None:
        super().__init__()
        self.rows = rows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        here = (self.rows.first <= layer) & (self.rows.last >= layer)
        assert len(q) == len(k) == len(v) == int(here.sum()) > 0
        self.owners, self.positions = OWNER[here].tolist(), POSITIONS[here].tolist()
        return super().__call__(layer, q, k, v, **how)


def ranges(first: int | list[int], last: int | list[int], hidden: Tensor | None = None):
    """The same layers for all rows, or layers by sequence."""
    by_owner = [
        torch.tensor([edge] * 3 if isinstance(edge, int) else edge)[OWNER] for edge in (first, last)
    ]
    return RowRanges(*by_owner, hidden)


def inputs(model: Model) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, positions and the lengths of all rows."""
    ids = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(5))
    return ids, POSITIONS, torch.full_like(ROWS, N // 3) if model.dynamic_rope else None


def run(
    model: Model, rows: RowRanges, logits_at: Tensor = ROWS[:0]
) -> tuple[Tensor, Tensor, list[int]]:
    """Logits, the rows that left, and the layers that attended."""
    attend = LayerwiseAttend(rows)
    ids, positions, lengths = inputs(model)
    logits, left = model.forward(ids, positions, logits_at, attend, lengths, rows=rows)
    return logits, left, attend.layers_called


def run_whole(model: Model) -> tuple[Tensor, list[Tensor]]:
    """Logits of all rows in an ordinary forward, and every layer's input, taken by hooks here."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    hooks = [
        layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.decoder_layers
    ]
    ids, positions, lengths = inputs(model)
    attend = NaiveAttend()
    attend.owners, attend.positions = OWNER.tolist(), POSITIONS.tolist()
    logits = model.forward(ids, positions, ROWS, attend, lengths)
    for hook in hooks:
        hook.remove()
    return logits, seen


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def gpt2() -> Model:
    register()
    config = GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    return Model(hf, None, "gpt2")


@pytest.fixture(params=[*CONFIGS, "gpt2"])
def model(request: pytest.FixtureRequest, tiny_dir) -> Model:
    if request.param == "gpt2":
        return gpt2()
    return load_model(tiny_dir(request.param), dtype="fp32", device="cpu")


@pytest.fixture
def llama(tiny_dir) -> Model:
    return load_model(tiny_dir("llama"), dtype="fp32", device="cpu")


def test_rows_through_all_layers_change_nothing(model):
    logits, left, called = run(model, ranges(0, LAST), ROWS)
    assert torch.equal(logits, run_whole(model)[0])
    assert left.shape == (0, HIDDEN)
    assert called == [0, 1, 2]


@pytest.mark.parametrize("depth", [0, 1])
def test_two_passes_give_the_logits_of_one(model, depth):
    expected, layer_inputs = run_whole(model)
    logits, left, called = run(model, ranges(0, depth))
    assert called == list(range(depth + 1))
    assert logits.shape == (0, VOCAB)
    assert_close(left, layer_inputs[depth + 1])

    logits, none, called = run(model, ranges(depth + 1, LAST, left), ROWS)
    assert called == list(range(depth + 1, LAYERS))
    assert_close(logits, expected)
    assert none.shape == (0, HIDDEN)


def test_some_rows_leave_and_the_others_go_through(model):
    expected, layer_inputs = run_whole(model)
    stay = (OWNER == 1).nonzero()[:, 0]
    logits, left, _ = run(model, ranges(0, [1, LAST, 0]), stay)
    assert_close(logits, expected[stay])
    last = torch.tensor([1, LAST, 0])[OWNER]
    at_leaving = torch.stack([layer_inputs[last[row] + 1][row] for row in ROWS if last[row] < LAST])
    assert_close(left, at_leaving)


def test_rows_enter_at_different_layers_of_one_forward(model):
    expected, layer_inputs = run_whole(model)
    first = torch.tensor([2, 0, 1])[OWNER]
    hidden = torch.stack([layer_inputs[first[row]][row] for row in ROWS if first[row] > 0])
    logits, _, _ = run(model, ranges([2, 0, 1], LAST, hidden), ROWS)
    assert_close(logits, expected)


def test_layers_between_those_that_rows_run_are_passed_over(model):
    expected, layer_inputs = run_whole(model)
    hidden = layer_inputs[2][OWNER == 0]
    rows = ranges([2, 0, 0], [2, 0, 0], hidden)
    at = (OWNER == 0).nonzero()[:, 0]
    logits, left, called = run(model, rows, at)
    assert called == [0, 2]
    assert_close(logits, expected[at])
    assert_close(left, layer_inputs[1][OWNER != 0])


def test_layers_that_no_row_needs_any_more_are_not_computed(llama):
    ran: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(llama.decoder_layers)
    ]
    run(llama, ranges(0, [0, 1, 0]))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]


def test_a_forward_leaves_the_model_as_it_was(llama):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.hf.modules())

    before = run_whole(llama)[0]
    run(llama, ranges(0, 0))
    run(llama, ranges(LAST, LAST, torch.ones(N, HIDDEN)), ROWS)
    assert hooks() == 0
    assert torch.equal(run_whole(llama)[0], before)


def test_impossible_rows_are_an_error(llama):
    with pytest.raises(ValueError, match=r"\[tokens\] = \[60\], not \[2\], \[60\]"):
        run(llama, RowRanges(ROWS[:2], ROWS))
    with pytest.raises(ValueError, match=r"row 1 cannot run layers 0 to 3; .* 0 to 2"):
        run(llama, ranges(0, [LAST, 3, LAST]))
    with pytest.raises(ValueError, match="row 2 cannot run layers 2 to 1"):
        run(llama, ranges([0, 0, 2], [LAST, LAST, 1], torch.zeros(20, HIDDEN)))
    with pytest.raises(ValueError, match=r"hidden must be \[20, 64\].*not \[0, 64\]"):
        run(llama, ranges([0, 1, 0], LAST))
    with pytest.raises(ValueError, match="row 1 has no logits"):
        run(llama, ranges(0, [LAST, 1, LAST]), torch.tensor([0, 1]))


def test_layers_that_return_more_than_hidden_states_are_refused(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    layer = decoder_layers(model.hf, model.attention_modules)[1]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: (plain(*args, **kwargs), None)
    with pytest.raises(UnsupportedModelError, match="return more than hidden states"):
        run(model, ranges(0, 1))


def test_a_model_without_a_list_of_layers_says_so():
    with pytest.raises(UnsupportedModelError, match="not in one list"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)), [nn.Linear(2, 2)])
