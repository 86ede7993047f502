"""The loss against a hand-worked case."""

import math

import torch

from tamis.train import loss
from tamis.train.data import ANSWER, FIRST, NO_LOSS, TEXT
from tamis.train.loss import Inputs, losses


def test_answers_are_weighted_means_and_text_is_added(monkeypatch):
    logits = torch.log(
        torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [0.2, 0.8], [0.01, 0.99]]])
    )
    monkeypatch.setattr(loss, "logits_at", lambda *_: logits)
    nothing = torch.zeros(1, 5, dtype=torch.long)
    targets = torch.tensor([[0, 0, 0, 1, 0]])
    classes = torch.tensor([[FIRST, ANSWER, TEXT, TEXT, NO_LOSS]])
    result = losses(None, Inputs(nothing, nothing, nothing, targets, classes), 0.3, 4.0)
    answer = (4 * math.log(2) + math.log(4)) / 5
    text = -(math.log(0.9) + math.log(0.8)) / 2
    assert math.isclose(result.answer, answer, rel_tol=1e-6)
    assert math.isclose(result.text, text, rel_tol=1e-6)
    assert math.isclose(result.total, answer + 0.3 * text, rel_tol=1e-6)
    assert result.right.tolist() == [[True, False, True, True, False]]
