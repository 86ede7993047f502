"""HeadInfer keeps a share of the KV heads on the device, spread evenly."""

from __future__ import annotations

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.place.headinfer import HeadInfer
from tamis.methods.views import LayerShape, ModelShape


def shape_of(*kv_heads: int) -> ModelShape:
    layers = tuple(LayerShape(2 * heads, heads, 8, 8) for heads in kv_heads)
    return ModelShape(layers, vocab_size=16, dtype=torch.float32)


def test_by_default_all_heads_lie_in_host_memory() -> None:
    assert not torch.cat(HeadInfer().on_device(shape_of(4, 4, 2))).any()


def test_with_all_resident_none_does() -> None:
    assert torch.cat(HeadInfer(resident=1.0).on_device(shape_of(4, 4, 2))).all()


def test_every_layer_answers_for_its_own_heads() -> None:
    masks = HeadInfer(resident=0.5).on_device(shape_of(4, 1, 2))
    assert [(len(mask), mask.dtype) for mask in masks] == [(n, torch.bool) for n in (4, 1, 2)]


@pytest.mark.parametrize("resident", [0.0, 0.05, 0.125, 0.25, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("kv_heads", [(8,) * 4, (1,) * 7, (3, 5, 2)])
def test_the_share_is_met_and_spread_evenly(resident: float, kv_heads: tuple[int, ...]) -> None:
    stays = torch.cat(HeadInfer(resident=resident).on_device(shape_of(*kv_heads))).tolist()
    total = sum(kv_heads)
    assert sum(stays) == round(resident * total)
    for start in range(total):  # any run of heads holds its share, but for one head
        for stop in range(start, total + 1):
            share = sum(stays) / total * (stop - start)
            assert abs(sum(stays[start:stop]) - share) <= 1 + 1e-9


@pytest.mark.parametrize("resident", [-0.1, 1.1])
def test_a_share_out_of_range_is_a_plan_error(resident: float) -> None:
    with pytest.raises(PlanError):
        HeadInfer(resident=resident)
