"""KNorm keeps the keys of smallest norm."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from keep_norms import KNorm


def test_it_keeps_the_keys_of_smallest_norm() -> None:
    keys = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    view = SimpleNamespace(
        layer=2,
        cached=torch.ones(2, 20, dtype=torch.bool),
        keys_values=lambda: (keys, keys),
    )
    method = KNorm()

    kept = method.keep(view, method.scores(view), torch.tensor([5, 20]))

    norms = [sum(x * x for x in key) ** 0.5 for key in keys[0].tolist()]
    shortest = sorted(range(20), key=lambda token: norms[token])[:5]
    assert kept[0].nonzero().flatten().tolist() == sorted(shortest)
    assert kept[1].all()  # a budget that holds everything keeps everything


def test_the_first_layers_keep_everything() -> None:
    view = SimpleNamespace(layer=1, cached=torch.ones(1, 9, dtype=torch.bool))
    scores = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))

    assert KNorm().keep(view, scores, torch.tensor([3])).all()
    assert KNorm(skip_layers=1).keep(view, scores, torch.tensor([3])).sum() == 3
