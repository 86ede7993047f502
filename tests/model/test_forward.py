"""A flattened ragged forward gives the logits that Transformers gives each sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tamis.model import LayerSpec, Model, load_model
from tests.model.naive import NaiveAttend
from tests.tiny_models import CONFIGS, VOCAB, WINDOW

LENGTHS = (3, 41, 18, 1)
"""One shorter and two longer than the window and one beyond the trained length of scaled RoPE."""


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


def run(model: Model, attend: NaiveAttend, pieces: list[tuple[int, int, Tensor]]) -> Tensor:
    """Logits of all tokens of `pieces`: (sequence, first position, ids), in one forward."""
    ids = torch.cat([piece for _, _, piece in pieces])
    positions = torch.cat([start + torch.arange(len(piece)) for _, start, piece in pieces])
    lengths = torch.cat([torch.full_like(piece, LENGTHS[owner]) for owner, _, piece in pieces])
    attend.owners = [owner for owner, _, piece in pieces for _ in piece]
    attend.positions = positions.tolist()
    return model.forward(ids, positions, torch.arange(len(ids)), attend, rope_lengths=lengths)


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name, tiny_dir) -> Model:
    return load_model(tiny_dir(name), dtype="fp32", device="cpu")


@pytest.fixture
def expected(name, tiny_model) -> list[Tensor]:
    """Logits [length, vocab] of each sequence, run alone by Transformers itself."""
    with torch.no_grad():
        return [tiny_model(name)(ids[None]).logits[0] for ids in sequences()]


def test_one_ragged_forward_gives_each_sequence_its_own_logits(model, expected):
    logits = run(model, NaiveAttend(), [(i, 0, ids) for i, ids in enumerate(sequences())])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=0)


def test_chunks_of_sequences_interleaved_give_the_same_logits(model, expected):
    attend, chunk, got = NaiveAttend(), 7, [[] for _ in LENGTHS]
    for start in range(0, max(LENGTHS), chunk):
        pieces = [
            (i, start, ids[start : start + chunk])
            for i, ids in enumerate(sequences())
            if start < len(ids)
        ]
        pieces.reverse()
        logits = run(model, attend, pieces).split([len(piece) for _, _, piece in pieces])
        for (owner, _, _), part in zip(pieces, logits, strict=True):
            got[owner].append(part)
    for parts, alone in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), alone, atol=1e-4, rtol=0)


def test_every_layer_attends_once_and_in_order(model):
    attend = NaiveAttend()
    run(model, attend, [(0, 0, torch.tensor([5, 6, 7]))])
    assert attend.layers_called == list(range(len(model.layers)))


def test_the_layer_specs_are_what_the_configuration_says(model, name):
    config = CONFIGS[name]()
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert len(model.layers) == config.num_hidden_layers
    for layer in model.layers:
        assert (layer.q_heads, layer.kv_heads) == (config.num_attention_heads, kv_heads)
        assert (layer.k_dim, layer.v_dim) == (16, 16)
    assert model.kv_bytes_per_token == config.num_hidden_layers * kv_heads * 32 * 4


def test_windows_softcaps_scales_and_sinks_are_recorded_per_layer(tiny_dir):
    def specs(name: str) -> tuple[LayerSpec, ...]:
        return load_model(tiny_dir(name), dtype="fp32", device="cpu").layers

    assert [layer.window for layer in specs("mistral")] == [WINDOW] * 3
    assert [layer.window for layer in specs("gemma2")] == [WINDOW, None, WINDOW]
    assert {layer.softcap for layer in specs("gemma2")} == {5.0}
    assert {layer.scale for layer in specs("gemma3")} == {24**-0.5}
    assert {layer.scale for layer in specs("granite")} == {0.2}
    assert all(layer.sinks for layer in specs("gpt-oss"))
    assert not any(layer.sinks for layer in specs("llama"))


def test_logits_are_computed_for_the_rows_asked_for_and_no_others(tiny_dir):
    model = load_model(tiny_dir("gemma2"), dtype="fp32", device="cpu")
    ids, attend = sequences()[1], NaiveAttend()
    every = run(model, attend, [(1, 0, ids)])

    def some(rows: list[int]) -> Tensor:
        attend = NaiveAttend()
        attend.owners, attend.positions = [0] * len(ids), list(range(len(ids)))
        positions = torch.arange(len(ids))
        return model.forward(ids, positions, torch.tensor(rows, dtype=torch.long), attend)

    torch.testing.assert_close(some([40, 2]), every[[40, 2]], atol=1e-5, rtol=0)
    assert some([]).shape == (0, VOCAB)


def test_disagreeing_shapes_are_an_error(tiny_dir):
    model = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    ids, rows = torch.tensor([1, 2, 3]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"\[tokens\].*\[3\], \[2\], \[1\]"):
        model.forward(ids, ids[:2], rows, NaiveAttend())
