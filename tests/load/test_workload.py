"""Requests are drawn from a seed: when they come, how long they are, what they share."""

from __future__ import annotations

import itertools
import statistics

import pytest

from tamis.errors import ConfigError
from tamis.load.lengths import Fixed, Uniform
from tamis.load.workload import Planned, Scale, Workload

WORDS = Scale(0, 1)  # a token each


def requests(workload: Workload, n: int, scale: Scale = WORDS) -> list[Planned]:
    return list(itertools.islice(workload.requests(scale), n))


def n_common(prompts: list[list[str]]) -> int:
    """Words that all begin with."""
    same = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*prompts, strict=True))
    return len(list(same))


def test_the_same_seed_asks_for_the_same() -> None:
    one = requests(Workload(2, Uniform(5, 50), Uniform(1, 9), 0.5, seed=3), 20)
    assert one == requests(Workload(2, Uniform(5, 50), Uniform(1, 9), 0.5, seed=3), 20)
    assert one != requests(Workload(2, Uniform(5, 50), Uniform(1, 9), 0.5, seed=4), 20)


def test_arrivals_are_those_of_a_poisson_process() -> None:
    times = [0.0, *(r.at_s for r in requests(Workload(5, Fixed(1), Fixed(1)), 4000))]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 5, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 5, rel=0.08)


def test_prompts_share_a_prefix_and_nothing_after_it() -> None:
    prompts = [r.prompt.split() for r in requests(Workload(1, Fixed(40), Fixed(1), 0.75), 8)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert 30 <= n_common(prompts) <= 31  # a word may happen to be the same
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 8
    none = [r.prompt.split() for r in requests(Workload(1, Fixed(40), Fixed(1)), 8)]
    assert n_common(none) == 0
    whole = {r.prompt for r in requests(Workload(1, Fixed(40), Fixed(1), 1.0), 8)}
    assert len(whole) == 1


def test_words_stand_for_tokens_as_the_server_counts_them() -> None:
    scale = Scale.between((8, 21), (32, 69))
    assert scale == Scale(5.0, 2.0)
    assert scale.words(105) == 50
    assert scale.words(1) == 1
    [request] = requests(Workload(1, Fixed(105), Fixed(1)), 1, scale)
    assert len(request.prompt.split()) == 50


@pytest.mark.parametrize(("rate", "shared", "reason"), [(0, 0, "rate"), (1, 1.5, "shared")])
def test_what_is_out_of_range_is_refused(rate: float, shared: float, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Workload(rate, Fixed(1), Fixed(1), shared)
