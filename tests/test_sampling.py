import math
import pickle

import numpy as np
import pytest

from tamis.errors import RequestError
from tamis.sampling import SamplingParams


def test_defaults_are_greedy_and_bounded():
    params = SamplingParams()
    assert params.greedy
    assert params.max_tokens == 64
    assert params.n == 1


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (0.01, False)])
def test_a_vanishing_temperature_is_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)])
def test_stop_takes_one_string_or_several(stop):
    assert SamplingParams(stop=stop).stop == ("end",)


def test_parameters_are_copies_that_the_caller_cannot_change():
    stop, bias = ["a"], {3: 1}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[4] = 2
    assert params.stop == ("a",)
    assert params.logit_bias == {3: 1.0}
    with pytest.raises(AttributeError):
        params.top_k = 3


def test_numpy_numbers_become_plain_ones():
    params = SamplingParams(top_k=np.int64(5), temperature=np.float32(0.5), seed=np.int32(1))
    assert (type(params.top_k), type(params.temperature), type(params.seed)) == (int, float, int)


def test_parameters_can_be_pickled_hashed_and_compared():
    params = SamplingParams(logit_bias={1: 2.0}, stop="x", seed=3)
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}, stop="x", seed=3))


def test_values_on_the_bounds_are_accepted():
    SamplingParams(
        max_tokens=1,
        min_tokens=1,
        temperature=100,
        top_k=1,
        top_p=1,
        min_p=1,
        repetition_penalty=0.01,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={0: -100, 1: 100},
        logprobs=0,
        seed=-1,
    )
    assert SamplingParams(max_tokens=None, min_tokens=10**9).max_tokens is None


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 1.5, "an integer at least 1"),
        ("max_tokens", True, "an integer at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("min_tokens", 65, "must not exceed"),
        ("min_tokens", None, "an integer at least 0"),
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", math.nan, "from 0 to 100"),
        ("temperature", math.inf, "from 0 to 100"),
        ("temperature", 10**400, "from 0 to 100"),
        ("temperature", "1", "a number from 0 to 100"),
        ("temperature", None, "a number from 0 to 100"),
        ("temperature", True, "a number from 0 to 100"),
        ("top_k", 0, "at least 1"),
        ("top_k", -1, "at least 1"),
        ("top_k", 2.0, "an integer at least 1"),
        ("top_p", 0, "greater than 0 and at most 1"),
        ("top_p", 1.01, "greater than 0 and at most 1"),
        ("top_p", math.nan, "greater than 0 and at most 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("repetition_penalty", math.inf, "from 0.01 to 100"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("stop", "", "non-empty"),
        ("stop", ["a", ""], "non-empty"),
        ("stop", ["a", 3], "non-empty strings"),
        ("stop", 3, "a sequence of strings"),
        ("stop_token_ids", 3, "a sequence of token ids"),
        ("stop_token_ids", "3", "a sequence of token ids"),
        ("stop_token_ids", [-1], "at least 0"),
        ("stop_token_ids", [1.0], "an integer"),
        ("ignore_eos", 1, "True or False"),
        ("include_stop", "yes", "True or False"),
        ("seed", 1.0, "an integer"),
        ("logit_bias", [1], "map token ids to numbers"),
        ("logit_bias", {"1": 1}, "an integer"),
        ("logit_bias", {-1: 1}, "at least 0"),
        ("logit_bias", {1: 101}, "from -100 to 100"),
        ("logit_bias", {1: math.nan}, "from -100 to 100"),
        ("logprobs", -1, "at least 0"),
        ("n", 0, "at least 1"),
        ("n", 1.0, "an integer at least 1"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(name, value, right):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert name in str(error.value)
    assert right in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"stop_token_ids": [100]}, "0 to 99"),
        ({"logit_bias": {100: 1.0}}, "0 to 99"),
        ({"logprobs": 101}, "only 100 tokens"),
    ],
)
def test_what_the_vocabulary_does_not_have_is_refused(wrong, says):
    params = SamplingParams(**wrong)
    params.validate_for(101)
    with pytest.raises(RequestError, match=says):
        params.validate_for(100)
