"""GemFilter runs the model on the tokens that an early layer chose."""

from __future__ import annotations

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.tokens.gemfilter import GemFilter
from tamis.methods.views import PassResult
from tests.methods.tokens.passes import Request, best, model


def chosen_by_definition(request: Request, layer: int, tokens: int, method: GemFilter) -> list[int]:
    """The tokens of largest pooled sum of products, and the last one."""
    sums = request.products[layer, :, tokens - 1, :tokens].double().sum(0).tolist()
    reach = method.kernel // 2
    scores = {}
    for i in range(tokens):
        near = sums[max(0, i - reach) : i + reach + 1]
        scores[i] = sum(near) / len(near)
    scores[tokens - 1] = float("inf")
    assert isinstance(method.budget, int)
    return best(scores, method.budget)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize(("layer", "heads"), [(0, 2), (2, 4), (5, 8)])
def test_it_chooses_by_the_last_tokens_products_summed_over_heads(
    seed: int, kernel: int, layer: int, heads: int
) -> None:
    request = Request(seed, 6, 40, q_heads=heads)
    method = GemFilter(layer=layer, budget=11, kernel=kernel)
    first, second = request.run(method.program(40, request.shape))
    assert (first.tokens.tolist(), first.layers) == (list(range(40)), range(layer + 1))
    assert second.tokens.tolist() == chosen_by_definition(request, layer, 40, method)


def test_the_chosen_tokens_run_through_the_whole_model_as_a_prompt_of_their_own() -> None:
    request = Request(0, 6, 40)
    first, second = request.run(GemFilter(budget=0.25).program(40, request.shape))
    assert (first.keep, second.keep) == (False, True)
    assert second.layers == range(6)
    assert second.positions is not None
    assert second.positions.tolist() == list(range(10))
    assert all(held == set(second.tokens.tolist()) for held in request.held)


@pytest.mark.parametrize(("n_layers", "layer"), [(1, 0), (2, 1), (8, 3), (32, 13)])
def test_the_layer_is_a_share_of_the_depth_by_default(n_layers: int, layer: int) -> None:
    first = next(GemFilter(budget=4).program(9, model(n_layers)))
    assert first.layers == range(layer + 1)


def test_a_share_of_the_whole_depth_is_the_last_layer() -> None:
    assert next(GemFilter(layer=1.0, budget=4).program(9, model(8))).layers == range(8)


@pytest.mark.parametrize(("budget", "tokens"), [(1.0, 40), (40, 40), (1024, 40), (1, 1), (0.1, 1)])
def test_a_budget_that_holds_everything_is_one_ordinary_pass(
    budget: int | float, tokens: int
) -> None:
    request = Request(1, 4, tokens)
    (only,) = request.run(GemFilter(budget=budget).program(tokens, request.shape))
    assert only.tokens.tolist() == list(range(tokens))
    assert (only.layers, only.keep, only.observe) == (range(4), True, 0)
    assert (only.positions, only.sees) == (None, None)


def test_the_last_token_takes_a_place_whatever_its_score() -> None:
    program = GemFilter(budget=3, kernel=1).program(8, model(4))
    next(program)
    weights = torch.full((4, 1, 8), 0.1)
    weights[..., -1] = 0.0
    weights[..., 5] = 0.4
    assert program.send(PassResult(weights, torch.arange(8))).tokens.tolist() == [0, 5, 7]


def test_a_budget_of_one_token_is_the_last_one() -> None:
    request = Request(2, 4, 20)
    assert request.run(GemFilter(budget=1).program(20, request.shape))[1].tokens.tolist() == [19]


def test_equal_scores_choose_the_earlier_tokens() -> None:
    request = Request(3, 4, 20)
    request.products.zero_()
    _, second = request.run(GemFilter(budget=4).program(20, request.shape))
    assert second.tokens.tolist() == [0, 1, 2, 19]


def test_tokens_that_a_window_hides_come_last() -> None:
    program = GemFilter(budget=4, kernel=1).program(8, model(4))
    next(program)
    weights = torch.zeros(4, 1, 8)
    weights[..., 4:] = torch.tensor([1e-9, 1e-6, 1e-3, 0.9])
    chosen = program.send(PassResult(weights, torch.arange(8))).tokens
    assert chosen.tolist() == [4, 5, 6, 7]


def test_a_layer_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(PlanError, match=r"layer=4.*4 layers.*at most 3"):
        GemFilter(layer=4).program(9, model(4))


@pytest.mark.parametrize(
    "wrong",
    [{"layer": -1}, {"layer": 1.5}, {"layer": "3"}, {"budget": 0}, {"budget": 1.5}, {"kernel": 4}],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="must be"):
        GemFilter(**wrong)  # type: ignore[arg-type]
