"""Documents that a model is asked about, in the benchmark's own words."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tamis.bench.tasks.samples import Sample, Suite, make_samples
from tamis.errors import ModelError
from tamis.model import Model

_SAMPLES = 8  # documents that are composed at once


def conversations(
    model: Model, length: int, *, haystack: Path | None = None, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of `length` tokens with six questions and their answers, without end.

    Args:
        model: whose tokenizer is used.
        haystack: text that facts are hidden in; None for the held-out standard library.

    Yields:
        Token ids, int64 [tokens], and the places from which the answers' tokens are predicted,
        int64 [m].

    Raises:
        ModelError: the model has no tokenizer.
        ConfigError: `haystack` cannot be read, `length` is too short for the facts, or too long for
            the model.
    """
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, and documents must be made for it")
    for batch in count():
        suite = Suite("multi_turn", length, _SAMPLES, seed=seed + batch, haystack=haystack)
        for sample in make_samples(suite, model.tokenizer, context=model.max_length):
            ids, places = _conversation(sample, model.tokenizer)
            yield torch.tensor(ids, device=model.device), torch.tensor(places, device=model.device)


def _conversation(
    sample: Sample, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    ids: list[int] = list(tokenizer.encode(sample.document))
    places: list[int] = []
    for question in sample.questions:
        ids += tokenizer.encode(question.prompt, add_special_tokens=False)
        answer = tokenizer.encode(question.answer + "\n", add_special_tokens=False)
        places += range(len(ids) - 1, len(ids) - 1 + len(answer))
        ids += answer
    return ids, places
