"""What is computed of joined contexts is what the papers' formulas say, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.reuse.cacheblend import CacheBlend
from tamis.methods.reuse.promptcache import PromptCache
from tamis.methods.views import LayerShape, ModelShape, PassResult
from tamis.model import Model
from tests.methods.reuse.conftest import DOCUMENTS, QUESTION, TEN, add, logprobs, make
from tests.methods.tokens.naive_llama import NaiveLlama

SHAPE = ModelShape((LayerShape(4, 2, 16, 16),) * 5, 100, torch.float32)


def joined(model: Model, documents: list[list[int]], question: list[int]) -> NaiveLlama:
    """A prompt of documents, each computed alone where it lies, and the question's embedding.

    Attention goes by distances, so that it is the same where a document is computed.
    """
    naive, at = NaiveLlama(model.hf), 0
    for document in documents:
        tokens = list(range(at, at + len(document)))
        for token, token_id in zip(tokens, document, strict=True):
            naive.embed(token, token_id)
        for layer in range(naive.n_layers):
            naive.run(layer, tokens)
        at += len(document)
    for token, token_id in enumerate(question, start=at):
        naive.embed(token, token_id)
    return naive


def first_token(naive: NaiveLlama, n: int) -> tuple[int, float]:
    """What follows a prompt of n tokens, and its log-probability."""
    model = naive._model
    logits = model.lm_head(model.model.norm(naive.hidden[-1][n - 1])).log_softmax(-1)
    return int(logits.argmax()), float(logits.max())


def blend(naive: NaiveLlama, first: int, reused: int, n: int, shares: list[float]) -> None:
    """CacheBlend, one token and one layer at a time."""
    running = list(range(first, n))
    for layer in range(naive.n_layers):
        if layer:
            deviations = {}
            for token in running:
                old = (naive.keys[layer].get(token), naive.values[layer].get(token))
                naive._project(layer, token)
                new = (naive.keys[layer][token], naive.values[layer][token])
                if old[0] is None:
                    continue
                deviations[token] = sum(
                    float((a - b).square().sum()) for a, b in zip(new, old, strict=True)
                )
                naive.keys[layer][token], naive.values[layer][token] = old
            count = round(shares[layer - 1] * (reused - first))
            chosen = sorted(deviations, key=lambda token: -deviations[token])[:count]
            running = sorted([*chosen, *range(reused, n)])
        for token in running:
            naive.keys[layer].pop(token, None)
            naive._project(layer, token)
        module = naive._model.model.layers[layer]
        for token in running:
            weights = naive.weights(layer, token, list(range(n)))
            v = torch.stack([naive.values[layer][one] for one in range(n)], 1)
            v = v.repeat_interleave(len(weights) // len(v), 0)
            mixed = torch.einsum("hn,hnd->hd", weights, v).flatten()
            states = naive.hidden[layer][token] + module.self_attn.o_proj(mixed)
            out = states + module.mlp(module.post_attention_layernorm(states))
            naive.hidden[layer + 1][token] = out


@pytest.mark.parametrize("chunk", [2048, 13])
@torch.no_grad()
def test_promptcache_attends_within_contexts_and_from_the_question_to_all(
    llama: Model, chunk: int
) -> None:
    naive = joined(llama, DOCUMENTS, QUESTION)
    n = sum(map(len, DOCUMENTS)) + len(QUESTION)
    for layer in range(naive.n_layers):
        naive.run(layer, list(range(n)))
    llm = make(llama, max_batch_tokens=chunk)
    [output] = llm.generate([QUESTION], TEN, "promptcache()", context=add(llm))
    token, logprob = first_token(naive, n)
    assert output.token_ids[0] == token
    assert logprobs(output)[0] == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize("chunk", [2048, 13])
@pytest.mark.parametrize("recompute", [0.1, 0.4])
@torch.no_grad()
def test_cacheblend_computes_again_what_deviates_most(
    llama: Model, recompute: float, chunk: int
) -> None:
    first, reused = len(DOCUMENTS[0]), sum(map(len, DOCUMENTS))
    n = reused + len(QUESTION)
    naive = joined(llama, DOCUMENTS, QUESTION)
    blend(naive, first, reused, n, CacheBlend(recompute=recompute).shares(naive.n_layers))
    llm = make(llama, max_batch_tokens=chunk)
    plan = f"cacheblend(recompute={recompute})"
    [output] = llm.generate([QUESTION], TEN, plan, context=add(llm))
    token, logprob = first_token(naive, n)
    assert output.token_ids[0] == token
    assert logprobs(output)[0] == pytest.approx(logprob, abs=1e-4)
    [cached] = llm.generate([QUESTION], TEN, "promptcache()", context=[*llm.engine.contexts._named])
    assert abs(logprobs(cached)[0] - logprob) > 1e-3  # it makes a difference


def test_shares_fall_around_their_mean_and_stay_shares() -> None:
    for recompute in (0.0, 0.15, 0.95, 1.0):
        shares = CacheBlend(recompute=recompute).shares(9)
        assert len(shares) == 8
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) / 8 == pytest.approx(recompute)
        assert all(0 <= share <= 1 for share in shares)
    assert CacheBlend().shares(2) == [0.15]
    assert CacheBlend().shares(1) == []


def test_a_program_names_the_largest_deviations_of_the_layer_before() -> None:
    program = CacheBlend(recompute=0.5, spread=0.5).program([4, 10], 17, SHAPE)
    assert program is not None
    generator, counts = random.Random(0), []
    one = next(program)
    assert one.tokens.tolist() == list(range(4, 17))  # the first context is exact
    while one.layers[-1] < 4:
        deviation = torch.tensor([generator.random() for _ in one.tokens])
        deviation[one.tokens >= 14] = torch.inf
        ranked = deviation.argsort(descending=True)
        tokens = one.tokens
        one = program.send(PassResult(None, None, deviation))
        assert one.tokens.tolist() == sorted(tokens[ranked[: len(one.tokens)]].tolist())
        counts.append(len(one.tokens) - 3)
    assert counts == [8, 6, 4, 2]  # of ten tokens; 0.75 of them to 0.25, rounded to even


def test_nothing_is_computed_again_without_a_share_or_a_second_context() -> None:
    assert PromptCache().program([4, 10], 17, SHAPE) is None
    assert CacheBlend(recompute=0.0).program([4, 10], 17, SHAPE) is None
    assert CacheBlend().program([14], 17, SHAPE) is None


def test_wrong_parameters_are_refused() -> None:
    for wrong in ({"recompute": 1.5}, {"recompute": -0.1}, {"spread": 2.0}):
        with pytest.raises(PlanError, match=next(iter(wrong))):
            CacheBlend(**wrong)
