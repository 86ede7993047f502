"""Greedy output equals Transformers' token for token, whatever the architecture and chunking."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from tamis import LLM, SamplingParams
from tamis.model import Model
from tests.tiny_models import CONFIGS

NEW_TOKENS = 12


@pytest.fixture(scope="session")
def expected(
    tiny_model: Callable[[str], PreTrainedModel], prompts: list[list[int]]
) -> Callable[[str], list[tuple[list[int], torch.Tensor]]]:
    """`expected(name)`: per prompt Transformers' own greedy tokens and their logits."""

    @cache
    def generate(name: str) -> list[tuple[list[int], torch.Tensor]]:
        results = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = tiny_model(name).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            results.append((output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits)))
        return results

    return generate


@pytest.mark.parametrize("chunk", [1, 7, 64, 2048])
@pytest.mark.parametrize("name", CONFIGS)
def test_batched_greedy_output_equals_transformers(
    name: str,
    chunk: int,
    load: Callable[[str], Model],
    prompts: list[list[int]],
    expected: Callable[[str], list[tuple[list[int], torch.Tensor]]],
) -> None:
    model = load(name)
    vocab = model.vocab_size
    llm = LLM(model, kv_memory="16MiB", max_batch_tokens=chunk, page_size=16)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=vocab)
    outputs = llm.generate(prompts, params)
    for output, (token_ids, logits) in zip(outputs, expected(name), strict=True):
        assert output.token_ids == token_ids
        assert output.logprobs is not None
        for entry, row in zip(output.logprobs, logits.log_softmax(-1), strict=True):
            ids, values = zip(*entry.top, strict=True)
            torch.testing.assert_close(torch.tensor(values), row[list(ids)], rtol=0, atol=1e-4)
    assert llm.engine.cache.bytes_in_use == 0
