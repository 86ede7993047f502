"""What these methods generate on the engine is what their papers' algorithms generate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tamis import LLM, SamplingParams
from tamis.methods.base import Tokens
from tamis.methods.tokens.gemfilter import GemFilter
from tamis.methods.tokens.lazyllm import LazyLLM
from tamis.methods.tokens.pyramidinfer import PyramidInfer
from tamis.model import load_model
from tamis.plan import Plan
from tests import tiny_models
from tests.methods.tokens.naive_llama import NaiveLlama
from tests.methods.tokens.passes import best

NEW = 24
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
PROMPTS = [
    torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (70, 33, 9)
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_models.build("llama")


@pytest.fixture(scope="module", params=[1024, 17], ids=["whole", "chunked"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory: Path = tiny_models.save("llama", tmp_path_factory.mktemp("llama"))
    loaded = load_model(directory, dtype="float32", device="cpu")
    return LLM(loaded, kv_memory="16MiB", page_size=16, max_batch_tokens=request.param)


def generated(llm: LLM, method: Tokens) -> list[list[int]]:
    """What the engine gives, all prompts in one batch."""
    return [output.token_ids for output in llm.generate(PROMPTS, PARAMS, plan=Plan((method,)))]


def dense(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Greedy continuation with all tokens in all layers."""
    naive, ids = NaiveLlama(model), list(prompt)
    for token in range(len(prompt) + NEW - 1):
        naive.embed(token, ids[token])
        for layer in range(naive.n_layers):
            naive.run(layer, list(range(token + 1)))
        if token >= len(prompt) - 1:
            ids.append(naive.next_id(token))
    return ids[len(prompt) :]


def by_gemfilter(model: PreTrainedModel, prompt: list[int], method: GemFilter) -> list[int]:
    naive, tokens = NaiveLlama(model), list(range(len(prompt)))
    for token in tokens:
        naive.embed(token, prompt[token])
    assert isinstance(method.layer, int)
    for layer in range(method.layer + 1):
        naive.run(layer, tokens)
    sums = naive.products(method.layer, tokens[-1], tokens).sum(0).tolist()
    near = [sums[max(0, i - 2) : i + 3] for i in tokens]
    scores = {i: sum(around) / len(around) for i, around in enumerate(near)}
    scores[tokens[-1]] = math.inf
    return dense(model, [prompt[i] for i in best(scores, round(method.budget * len(prompt)))])


def by_lazyllm(model: PreTrainedModel, prompt: list[int], method: LazyLLM) -> list[int]:
    naive, ids = NaiveLlama(model), list(prompt)
    for token, token_id in enumerate(prompt):
        naive.embed(token, token_id)
    for newest in range(len(prompt) - 1, len(prompt) + NEW - 1):
        naive.embed(newest, ids[newest])
        seen = list(range(newest + 1))
        for layer in range(naive.n_layers):
            if layer in (1, 2):  # 0.3, 0.5 and 0.7 of 3 layers
                weights = naive.weights(layer - 1, newest, seen).mean(0).tolist()
                scores = dict(zip(seen, weights, strict=True)) | {newest: math.inf}
                seen = best(scores, math.ceil(method.keep * len(seen)))
            naive.run(layer, seen)
        ids.append(naive.next_id(newest))
    return ids[len(prompt) :]


def share(least: float, layer: int, n_layers: int) -> float:
    return least + (1 - least) * (math.cos(math.pi * layer / n_layers) + 1) / 2


def attended(
    rows: list[Tensor], recents: int, columns: list[int], method: PyramidInfer
) -> dict[int, float]:
    """Weighted means over heads and recent queries, of the columns (indices of the rows)."""
    step = (method.distance - 1) / max(1, recents - 1)
    counts = [1 + i * step for i in range(recents)][-len(rows) :]
    return {
        at: sum(float(row[:, at].mean()) * c for row, c in zip(rows, counts, strict=True))
        for at in columns
    }


def by_pyramidinfer(model: PreTrainedModel, prompt: list[int], method: PyramidInfer) -> list[int]:
    naive, ids, n = NaiveLlama(model), list(prompt), len(prompt)
    for token, token_id in enumerate(prompt):
        naive.embed(token, token_id)
    recents = int(method.recent * n) + 1
    reach = [list(range(n))]
    held: list[list[int]] = []
    for layer in range(naive.n_layers):
        seen = reach[-1]
        naive.run(layer, seen)
        held.append(seen)
        context = seen[:-recents]
        count = int(share(method.decay, layer, naive.n_layers) * len(context))
        if count > method.minimum:
            rows = [naive.weights(layer, token, seen) for token in seen[-recents:]]
            scores = attended(rows, recents, list(range(len(context))), method)
            scores |= dict.fromkeys(range(min(method.sinks, len(context))), math.inf)
            context = [context[i] for i in best(scores, count)]
        reach.append(context + seen[-recents:])
    ids.append(naive.next_id(n - 1))
    for newest in range(n, n + NEW - 1):
        naive.embed(newest, ids[newest])
        for layer in range(naive.n_layers):
            held[layer].append(newest)
            naive.run(layer, held[layer])
        ids.append(naive.next_id(newest))
        if (newest + 1 - n) % method.interval == 0:
            held = [thinned(naive, layer, tokens, n, method) for layer, tokens in enumerate(held)]
    return ids[n:]


def thinned(
    naive: NaiveLlama, layer: int, held: list[int], prompt: int, method: PyramidInfer
) -> list[int]:
    """What a layer holds after a round of judging its generated tokens."""
    tokens = held[-1] + 1
    recents = int(method.recent * tokens) + 1
    before = tokens - method.interval
    begin = max(prompt, before - 1 - int(method.recent * before))
    judged = [token for token in held if begin <= token < tokens - recents]
    if not judged:
        return held
    rows = [naive.weights(layer, token, held) for token in held[-recents:]]
    scores = attended(rows, recents, [held.index(token) for token in judged], method)
    count = max(1, int(share(method.generated, layer, naive.n_layers) * len(judged)))
    stay = {held[i] for i in best(scores, count)}
    return [token for token in held if token not in judged or token in stay]


@torch.inference_mode()
@pytest.mark.parametrize("method", [GemFilter(layer=1, budget=0.4), GemFilter(layer=0, budget=0.9)])
def test_gemfilter_generates_from_the_chosen_tokens(
    llm: LLM, model: PreTrainedModel, method: GemFilter
) -> None:
    expected = [by_gemfilter(model, prompt, method) for prompt in PROMPTS]
    assert generated(llm, method) == expected
    assert expected != [dense(model, prompt) for prompt in PROMPTS]


@torch.inference_mode()
@pytest.mark.parametrize("method", [LazyLLM(), LazyLLM(keep=0.3)], ids=str)
def test_lazyllm_prunes_and_revives(llm: LLM, model: PreTrainedModel, method: LazyLLM) -> None:
    expected = [by_lazyllm(model, prompt, method) for prompt in PROMPTS]
    assert generated(llm, method) == expected
    assert expected != [dense(model, prompt) for prompt in PROMPTS]


@torch.inference_mode()
@pytest.mark.parametrize(
    "method",
    [
        PyramidInfer(minimum=4, decay=0.4, generated=1.0),
        PyramidInfer(minimum=4, decay=0.4, recent=0.1, interval=6),
    ],
    ids=str,
)
def test_pyramidinfer_thins_out_layers(
    llm: LLM, model: PreTrainedModel, method: PyramidInfer
) -> None:
    expected = [by_pyramidinfer(model, prompt, method) for prompt in PROMPTS]
    assert generated(llm, method) == expected
    assert expected != [dense(model, prompt) for prompt in PROMPTS]


@torch.inference_mode()
def test_thinning_out_generated_tokens_matters(model: PreTrainedModel) -> None:
    thin, whole = (
        by_pyramidinfer(model, PROMPTS[2], PyramidInfer(recent=0.1, interval=6, generated=share))
        for share in (0.1, 1.0)
    )
    assert thin != whole
