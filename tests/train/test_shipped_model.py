"""The model that ships answers as its card says, in Transformers and in tamis alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tamis import LLM, SamplingParams, shipped
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.train.evaluate import evaluate

LENGTH = 2048
SAMPLES = 10
UNSEEN = 2024
"""A seed that the card's samples were not drawn with."""


@pytest.fixture(scope="module")
def folder() -> Path:
    found = shipped.find()
    if found is None:
        pytest.skip("needs the reference model in models/; `tamis train reference` makes it")
    return found


@pytest.fixture(scope="module")
def card(folder: Path) -> dict[str, float]:
    """Exact match by task at LENGTH, as measured when the model was made."""
    scores: list[dict[str, Any]] = json.loads((folder / "evaluation.json").read_text())["scores"]
    return {score["task"]: score["exact"] for score in scores if score["length"] == LENGTH}


@pytest.mark.slow
def test_it_reaches_the_scores_of_its_card_on_unseen_samples(
    folder: Path, card: dict[str, float]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    suites = [
        Suite(task, LENGTH, SAMPLES // 5 if task == "multi_turn" else SAMPLES, seed=UNSEEN)
        for task in card
    ]
    assert suites
    for score in evaluate(model, tokenizer, suites):
        claimed = card[score.task]
        # Two and a half standard deviations of so few samples, with half a sample for certainty.
        spread = math.sqrt((claimed * (1 - claimed) + 0.5 / score.count) / score.count)
        assert score.exact >= claimed - 2.5 * spread, (score.task, score.exact, claimed)


def test_tamis_answers_what_transformers_answers(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", kv_memory="256MiB")
    samples = make_samples(Suite("multi_key", LENGTH, 4, seed=UNSEEN), llm.model.tokenizer)
    prompts = [llm.encode(sample.document) for sample in samples]
    for prompt, sample in zip(prompts, samples, strict=True):
        prompt += llm.encode(sample.questions[0].prompt)[1:]  # one BOS is enough
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=None
        )
        assert output.token_ids == expected[0, len(prompt) :].tolist()
