"""PyramidInfer thins out the context from layer to layer, and generated tokens now and then."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.tokens.pyramid import PyramidGeneration
from tamis.methods.tokens.pyramidinfer import PyramidInfer
from tamis.methods.views import LayerShape, ModelShape, PassResult
from tests.methods.evict.random_layer import best as best_indices
from tests.methods.evict.random_layer import decide, kept_positions, random_layer
from tests.methods.layer import NaiveLayerView
from tests.methods.tokens.passes import Request, best


def reaching(request: Request, tokens: int, method: PyramidInfer) -> list[list[int]]:
    """Per layer the tokens that reach it, by the paper's formulas."""
    n_layers, recents = len(request.held), int(method.recent * tokens) + 1
    recent = list(range(tokens - recents, tokens))
    stages = [list(range(tokens))]
    for layer in range(n_layers - 1):
        context = [token for token in stages[-1] if token not in recent]
        wave = (math.cos(math.pi * layer / n_layers) + 1) / 2
        count = int(len(context) * ((1 - method.decay) * wave + method.decay))
        if count <= method.minimum:
            count = len(context)
        scores = dict.fromkeys(context, 0.0)
        step = (method.distance - 1) / max(1, recents - 1)
        for i, query in enumerate(recent):
            if i < recents - method.queries:
                continue
            weights = request.weights(layer, query, stages[-1]).sum(0).tolist()
            for j, token in enumerate(context):
                scores[token] += weights[j] * (1 + i * step)
        scores |= {token: float("inf") for token in context if token < method.sinks}
        stages.append(best(scores, count) + recent)
    return stages


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "method",
    [
        PyramidInfer(minimum=4),
        PyramidInfer(minimum=10, decay=0.5),
        PyramidInfer(minimum=0, decay=0.6, queries=5, distance=3.0),
        PyramidInfer(minimum=2, decay=0.3, recent=0.0, sinks=0),
        PyramidInfer(minimum=0, decay=0.1, sinks=8),
    ],
    ids=str,
)
def test_each_layer_computes_what_recent_tokens_attend_to(seed: int, method: PyramidInfer) -> None:
    request = Request(seed, 6, 60)
    passes = request.run(method.program(60, request.shape))
    expected = reaching(request, 60, method)
    assert [sorted(held) for held in request.held] == expected
    assert len(expected[-1]) < 60
    assert passes[-1].tokens.tolist() == expected[-1]
    assert all(one.sees is None and one.positions is None and one.keep for one in passes)


def test_layers_between_which_nothing_leaves_are_one_pass() -> None:
    request = Request(0, 6, 60)
    passes = request.run(PyramidInfer(minimum=4).program(60, request.shape))
    assert passes[0].layers == range(2)  # at layer 0 the cosine lets everything go on
    assert [layer for one in passes for layer in one.layers] == list(range(6))
    assert all(len(b.tokens) < len(a.tokens) for a, b in pairwise(passes))


def test_recent_tokens_that_judge_are_limited() -> None:
    shape = Request(0, 6, 1).shape
    assert next(PyramidInfer().program(200, shape)).observe == 41
    assert next(PyramidInfer().program(2000, shape)).observe == 64


@pytest.mark.parametrize(
    ("method", "tokens"),
    [
        (PyramidInfer(decay=1.0), 200),
        (PyramidInfer(recent=1.0), 200),
        (PyramidInfer(minimum=200), 200),
        (PyramidInfer(), 80),
        (PyramidInfer(minimum=0), 1),
        (PyramidInfer(minimum=0), 2),
    ],
)
def test_a_prompt_that_loses_nothing_is_one_ordinary_pass(
    method: PyramidInfer, tokens: int
) -> None:
    request = Request(0, 6, tokens)
    (only,) = request.run(method.program(tokens, request.shape))
    assert (only.tokens.tolist(), only.layers) == (list(range(tokens)), range(6))
    assert (only.observe, only.keep, only.positions) == (0, True, None)


def test_equal_weights_keep_the_earlier_tokens() -> None:
    shape = Request(0, 3, 1).shape
    program = PyramidInfer(minimum=4, decay=0.5, distance=1.0).program(50, shape)
    observed = next(program).observe
    second = program.send(PassResult(torch.full((4, observed, 50), 1 / 64), torch.arange(50)))
    # of 39 tokens of context, layer 1 of 3 lets floor(0.875 * 39) = 34 go on
    assert second.tokens.tolist() == [*range(34), *range(39, 50)]


def generating(seed: int, prompt: int, layer: int, tokens: int = 60) -> NaiveLayerView:
    """A layer of a model of 4 after a prompt of so many tokens and generated ones."""
    own = LayerShape(4, 2, 8, 6)
    shape = ModelShape((own,) * 4, vocab_size=16, dtype=torch.float32)
    return random_layer(seed, tokens, prompt_tokens=prompt, layer=layer, shape=shape)


def thinned(method: PyramidGeneration, view: NaiveLayerView) -> set[int]:
    """Positions that go: of the generated tokens that left the recent ones since the last round."""
    tokens = int(view.positions.max()) + 1
    recents = int(method.recent * tokens) + 1
    before = tokens - method.every
    recents_before = int(method.recent * before) + 1
    judged = range(max(view.prompt_tokens, before - recents_before), tokens - recents)
    m = min(method.queries, recents)
    weights = view.window(m).sum(0)
    counts = [1 + i * (method.distance - 1) / (recents - 1) for i in range(recents)][-m:]
    scores = [
        sum(float(weights[i, token]) * count for i, count in enumerate(counts)) for token in judged
    ]
    wave = (math.cos(math.pi * view.layer / 4) + 1) / 2
    share = (1 - method.least) * wave + method.least
    stays = best_indices(scores, max(1, int(share * len(judged))))
    return {token for i, token in enumerate(judged) if i not in stays}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize(
    "method",
    [
        PyramidGeneration(),
        PyramidGeneration(least=0.4, recent=0.1, queries=3, distance=4.0),
        PyramidGeneration(least=0.01, every=30),
        PyramidGeneration(least=0.01, every=5),
    ],
    ids=str,
)
def test_generated_tokens_are_thinned_out_when_they_are_recent_no_more(
    seed: int, layer: int, method: PyramidGeneration
) -> None:
    view = generating(seed, 20, layer)
    goes = thinned(method, view)
    assert bool(goes) == (layer > 0)
    expected = [token for token in range(60) if token not in goes]
    assert kept_positions(view, decide(method, view, 1)) == [expected] * 2


def test_at_the_prompts_end_and_while_all_generated_tokens_are_recent_nothing_goes() -> None:
    for prompt in (60, 55, 48):
        view = generating(0, prompt, 3)
        assert (decide(PyramidGeneration(), view, 1) == view.cached).all()


def test_a_round_leaves_alone_what_an_earlier_one_kept() -> None:
    method = PyramidGeneration(recent=0.0, every=10)
    view = generating(0, 20, 3)
    goes = set(range(60)) - set(kept_positions(view, decide(method, view, 1))[0])
    assert goes
    assert goes <= set(range(49, 59))


def test_tokens_that_are_gone_already_are_not_judged() -> None:
    view = generating(1, 20, 3)
    method = PyramidGeneration()
    whole = decide(method, view, 1)
    view.positions = view.positions[:, 30:]
    view.k, view.v, view.lengths = view.k[:, 30:], view.v[:, 30:], view.lengths - 30
    view.k[:, :5] = 0.0  # their keys differ now, not which of them are judged
    judged = decide(method, view, 1)
    assert int(judged.sum()) == int(whole[:, 30:].sum())


def test_the_eviction_takes_over_what_it_needs() -> None:
    method = PyramidInfer(generated=0.3, recent=0.1, distance=2.0, queries=7, interval=5)
    assert method.eviction() == PyramidGeneration(0.3, 0.1, 2.0, 7, 5)
    eviction = method.eviction()
    assert eviction is not None
    assert (eviction.interval, eviction.needs().queries, eviction.per_chunk) == (5, 7, False)


def test_nothing_is_evicted_where_all_generated_tokens_stay() -> None:
    assert PyramidInfer(generated=1.0).eviction() is None


@pytest.mark.parametrize("layer", range(4))
def test_a_share_of_one_keeps_every_generated_token(layer: int) -> None:
    view = generating(2, 20, layer)
    assert (decide(PyramidGeneration(least=1.0), view, 1) == view.cached).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"decay": 0.0},
        {"decay": 1.1},
        {"generated": 0.0},
        {"recent": 1.5},
        {"minimum": -1},
        {"sinks": -1},
        {"distance": 0.0},
        {"queries": 0},
        {"interval": 0},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="must be"):
        PyramidInfer(**wrong)  # type: ignore[arg-type]
