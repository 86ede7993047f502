"""LazyLLM lets tokens wait on their way through the layers, and takes them along when needed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tamis.errors import PlanError
from tamis.methods.tokens.lazyllm import LazyLLM
from tamis.methods.views import Pass
from tests.methods.tokens.passes import Request, best

CUTS = [2, 4, 6, 7]
"""Where the defaults prune a model of 8 layers."""


def survivors(
    request: Request, newest: int, layer: int, among: list[int], keep: float
) -> list[int]:
    """The share of `among` to which the newest token attends most at a layer, and itself."""
    weights = request.weights(layer, newest, among).tolist()
    scores = {
        token: sum(head[i] for head in weights) / len(weights) for i, token in enumerate(among)
    }
    scores[newest] = float("inf")
    return best(scores, math.ceil(keep * len(among)))


def by_definition(request: Request, newest: int, keep: float) -> list[list[int]]:
    """Which tokens take part between every two prunings."""
    stages = [list(range(newest + 1))]
    for cut in CUTS:
        stages.append(survivors(request, newest, cut - 1, stages[-1], keep))
    return stages


def took_part(request: Request, one: Pass) -> list[int]:
    """The tokens of a pass and those that it saw, at its first layer."""
    if one.sees is None:
        return sorted(request.held[one.layers[0]])
    return sorted({*one.tokens.tolist(), *one.sees.tolist()})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95])
def test_every_pruning_keeps_what_the_last_token_attends_to(seed: int, keep: float) -> None:
    request = Request(seed, 8, 40)
    passes = request.run(LazyLLM(keep=keep).program(40, request.shape))
    assert [one.tokens.tolist() for one in passes] == by_definition(request, 39, keep)
    assert [one.layers for one in passes] == [range(*span) for span in pairwise([0, *CUTS, 8])]
    assert [one.observe for one in passes] == [1, 1, 1, 1, 0]
    assert all(one.sees is None and one.positions is None and one.keep for one in passes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_generated_tokens_see_what_they_attend_to_of_the_whole_request(
    seed: int, keep: float
) -> None:
    request, method = Request(seed, 8, 30), LazyLLM(keep=keep)
    request.run(method.program(20, request.shape))
    revived = 0
    for newest in range(20, 30):
        before = request.cached()
        passes = request.run(method.step(newest, before, request.shape))
        expected = by_definition(request, newest, keep)
        for one, stage in zip(passes, expected, strict=True):
            held = set(before[one.layers[0]].tolist())
            lacking = [token for token in stage if token not in held]
            assert one.tokens.tolist() == lacking
            assert lacking[-1] == newest
            revived += len(lacking) - 1
            if one.sees is None:
                assert held <= set(stage)
            else:
                assert took_part(request, one) == stage
    assert revived > 0


def test_a_token_goes_on_from_the_layer_where_it_left() -> None:
    request, method = Request(0, 8, 12), LazyLLM(keep=0.5, prunings=1, first=0.5, last=0.5)
    request.run(method.program(10, request.shape))
    left = sorted(request.held[0] - request.held[4])
    wanted = left[0]
    request.products[3, :, 10, wanted] = 50.0
    _, second = request.run(method.step(10, request.cached(), request.shape))
    assert wanted in second.tokens.tolist()
    assert second.layers == range(4, 8)
    assert all(wanted in held for held in request.held)


def test_tokens_that_left_earlier_are_no_candidates_later() -> None:
    request, method = Request(1, 8, 41), LazyLLM(keep=0.5)
    request.run(method.program(40, request.shape))
    request.products[1, :, 40, 0] = -50.0  # the first pruning drops token 0
    request.products[3:, :, 40, 0] = 50.0  # the later ones would have it
    passes = request.run(method.step(40, request.cached(), request.shape))
    for one in passes[1:]:
        assert one.sees is not None
        assert 0 not in one.sees.tolist()
        assert 0 not in one.tokens.tolist()


def test_keeping_all_brings_every_token_through_every_layer() -> None:
    request, method = Request(2, 8, 22), LazyLLM(keep=1.0)
    for one in request.run(method.program(20, request.shape)):
        assert (one.tokens.tolist(), one.sees) == (list(range(20)), None)
    for newest in (20, 21):
        for one in request.run(method.step(newest, request.cached(), request.shape)):
            assert (one.tokens.tolist(), one.sees) == ([newest], None)
    assert request.held == [set(range(22))] * 8


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_prompts_end_at_the_last_layer(tokens: int) -> None:
    request = Request(3, 8, tokens + 1)
    method = LazyLLM(keep=0.1)
    last = request.run(method.program(tokens, request.shape))[-1]
    assert (last.tokens.tolist(), last.layers) == ([tokens - 1], range(7, 8))
    last = request.run(method.step(tokens, request.cached(), request.shape))[-1]
    assert last.tokens.tolist() == [tokens]


@pytest.mark.parametrize(
    ("n_layers", "spans"),
    [
        (1, [(0, 1)]),
        (2, [(0, 1), (1, 2)]),
        (3, [(0, 1), (1, 2), (2, 3)]),
        (32, [(0, 10), (10, 16), (16, 22), (22, 29), (29, 32)]),
    ],
)
def test_prunings_spread_over_the_depth(n_layers: int, spans: list[tuple[int, int]]) -> None:
    request = Request(4, n_layers, 12)
    passes = request.run(LazyLLM().program(12, request.shape))
    assert [one.layers for one in passes] == [range(*span) for span in spans]


def test_equal_weights_keep_the_earlier_tokens() -> None:
    request = Request(5, 8, 10)
    request.products.zero_()
    passes = request.run(LazyLLM(keep=0.5, prunings=1).program(10, request.shape))
    assert passes[1].tokens.tolist() == [0, 1, 2, 3, 9]


def test_generated_tokens_have_programs_and_nothing_is_evicted() -> None:
    assert LazyLLM.steps
    assert LazyLLM().eviction() is None


@pytest.mark.parametrize(
    "wrong",
    [{"keep": 0.0}, {"keep": 1.1}, {"prunings": 0}, {"first": -0.1}, {"first": 0.8, "last": 0.5}],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="must be"):
        LazyLLM(**wrong)  # type: ignore[arg-type]


def test_weights_over_unseen_tokens_do_not_count() -> None:
    """Two heads, one of which looks mostly at a token that was not taken along: by weights over all
    that is held it would have next to no say."""
    request, method = (
        Request(6, 4, 6, q_heads=2),
        LazyLLM(keep=0.67, prunings=2, first=0.5, last=0.75),
    )
    request.run(method.program(5, request.shape))
    left = next(iter(request.held[2] - {4}))
    request.products[1, :, 5] = 0.0
    request.products[1, :, 5, left] = -50.0
    request.products[2, 0, 5, left] = 50.0
    passes = request.run(method.step(5, request.cached(), request.shape))
    seen = survivors(request, 5, 1, list(range(6)), 0.67)
    assert left not in seen
    assert took_part(request, passes[2]) == survivors(request, 5, 2, seen, 0.67)
