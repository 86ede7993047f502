import math
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tamis.engine.sampler import SHORT_HEAD, Sampled, SamplerState, probabilities, sample
from tamis.sampling import SamplingParams

VOCAB = 509  # prime: no row starts on a vector boundary


def random_logits(rows, vocab=VOCAB, scale=4.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def state(prompt_ids=(), output_ids=(), eos_token_ids=(), **params):
    result = SamplerState(SamplingParams(**params), prompt_ids, eos_token_ids)
    for token_id in output_ids:
        result.observe(token_id)
    return result


def adjusted(logits, sampler_state):
    row = logits.clone()
    sampler_state.adjust(row)
    return row


# Greedy


def test_greedy_takes_the_most_probable_token_of_each_row():
    logits = random_logits(8)
    results = sample(logits, [state() for _ in range(8)])
    assert results == [Sampled(int(row.argmax())) for row in logits]


def test_sampling_leaves_the_logits_as_they_were():
    logits = random_logits(2)
    before = logits.clone()
    sample(
        logits,
        [state(repetition_penalty=2.0, prompt_ids=range(9)), state(temperature=1.0, top_p=0.5)],
    )
    assert torch.equal(logits, before)


# The distribution, against the warpers of 🤗 generate in generate's order


def hf_probabilities(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, logits).softmax(dim=-1)


DISTRIBUTIONS = [
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100 * VOCAB},
    {"temperature": 0.5, "top_k": 400},
    {"top_p": 0.01},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 40, "min_p": 0.1},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 3.0, "top_k": 50, "top_p": 0.95, "min_p": 0.2},
]


@pytest.mark.parametrize("settings", DISTRIBUTIONS, ids=str)
def test_each_setting_gives_the_distribution_of_transformers(settings):
    logits = random_logits(5, seed=1)
    params = SamplingParams(**{"temperature": 1.0, **settings})
    ours = probabilities(logits, [params] * 5)
    theirs = hf_probabilities(logits, **settings)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs)


def test_rows_of_one_batch_keep_their_own_settings():
    logits = random_logits(len(DISTRIBUTIONS), seed=2)
    params = [SamplingParams(**{"temperature": 1.0, **settings}) for settings in DISTRIBUTIONS]
    ours = probabilities(logits, params)
    for row, settings in enumerate(DISTRIBUTIONS):
        theirs = hf_probabilities(logits[row : row + 1], **settings)[0]
        torch.testing.assert_close(ours[row], theirs)


@pytest.mark.parametrize("scale", [0.01, 2.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_k", [None, 3 * SHORT_HEAD])
def test_top_p_is_exact_whether_or_not_the_head_of_the_vocabulary_suffices(scale, top_k):
    logits = random_logits(2, vocab=5 * SHORT_HEAD, scale=scale, seed=3)
    logits[1] = random_logits(1, vocab=5 * SHORT_HEAD, scale=5.0, seed=4)[0]
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=top_k)
    ours = probabilities(logits, [params] * 2)
    theirs = hf_probabilities(logits, top_p=0.9, top_k=top_k)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs)


def test_tokens_that_tie_with_the_last_kept_one_stay():
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]])
    kept_by_k = probabilities(logits, [SamplingParams(temperature=1.0, top_k=3)])[0] > 0
    assert kept_by_k.tolist() == [True, True, True, True, True, False]
    kept_by_p = probabilities(torch.zeros(1, 4), [SamplingParams(temperature=1.0, top_p=0.3)])
    assert kept_by_p.tolist() == [[0.25] * 4]


def test_the_smallest_temperature_that_draws_cannot_overflow():
    logits = torch.tensor([[1e30, -1e30, 3e30, -math.inf]])
    result = probabilities(logits, [SamplingParams(temperature=1e-5, top_p=0.5, min_p=0.1)])
    assert result.tolist() == [[0.0, 0.0, 1.0, 0.0]]


# Draws


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "min_p": 0.05}], ids=str)
def test_frequencies_of_draws_follow_the_distribution(settings):
    n, vocab = 20_000, 12
    logits = random_logits(1, vocab=vocab, scale=1.5, seed=5)
    params = SamplingParams(temperature=0.9, seed=11, **settings)
    expected = hf_probabilities(logits, temperature=0.9, **settings)[0] * n
    one = SamplerState(params)
    counts = Counter()
    for _ in range(n // 1000):  # 1000 rows at once, all drawing from one stream
        counts.update(r.token_id for r in sample(logits.expand(1000, vocab), [one] * 1000))
    observed = torch.tensor([counts[i] for i in range(vocab)], dtype=torch.float32)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    chi2 = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    # The 99.9 % quantile for 11 degrees of freedom; for fewer it is lower still.
    assert chi2 < 31.3


def test_a_draw_is_the_first_token_where_the_cdf_exceeds_the_uniform_number():
    logits = random_logits(1, vocab=50, scale=1.0, seed=6)
    cdf = logits[0].double().softmax(0).cumsum(0)
    drawing, shadow = state(temperature=1.0, seed=3), state(temperature=1.0, seed=3)
    for _ in range(200):
        expected = int((cdf <= shadow.uniform()).sum())
        assert sample(logits, [drawing])[0].token_id == expected


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53], ids=["lowest", "highest"])
def test_an_impossible_token_is_never_drawn(monkeypatch, uniform):
    logits = random_logits(1, seed=7)
    logits[0, :20] = logits[0, -20:] = -math.inf
    extreme = state(temperature=1.0)
    monkeypatch.setattr(extreme, "uniform", lambda: uniform)
    token_id = sample(logits, [extreme])[0].token_id
    assert 20 <= token_id < VOCAB - 20


def draws(sampler_state, n=40):
    logits = random_logits(1, scale=1.0, seed=8)
    return [sample(logits, [sampler_state])[0].token_id for _ in range(n)]


def test_a_seed_reproduces_its_draws_and_no_seed_does_not():
    assert draws(state(temperature=1.0, seed=5)) == draws(state(temperature=1.0, seed=5))
    assert draws(state(temperature=1.0, seed=5)) != draws(state(temperature=1.0, seed=6))
    assert draws(state(temperature=1.0)) != draws(state(temperature=1.0))


def test_branches_draw_differently_and_reproducibly():
    streams = [tuple(draws(state(temperature=1.0, seed=5).fork(i))) for i in range(5)]
    assert len(set(streams)) == 5
    assert streams[0] == tuple(draws(state(temperature=1.0, seed=5)))
    assert streams == [tuple(draws(state(temperature=1.0, seed=5).fork(i))) for i in range(5)]


def test_branches_of_an_unseeded_request_draw_differently():
    first = state(temperature=1.0)
    assert draws(first.fork(1)) != draws(first.fork(2))


def test_a_branch_counts_its_own_tokens_from_the_common_past_on():
    trunk = state(frequency_penalty=1.0, output_ids=[1, 1, 2])
    branch = trunk.fork(1)
    for token_id in (2, 3, 4):
        branch.observe(token_id)
    trunk.observe(4)
    zeros = torch.zeros(5)
    assert adjusted(zeros, trunk).tolist() == [0, -2, -1, 0, -1]
    assert adjusted(zeros, branch).tolist() == [0, -2, -2, -1, -1]
    assert (trunk.n_tokens, branch.n_tokens) == (4, 6)


# A row does not depend on the rows beside it

MIXED = [
    {},
    {"logprobs": 3},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 9, "logprobs": 2},
    {"temperature": 1.4, "seed": 3, "top_p": 0.7},
    {"temperature": 1.4, "seed": 4, "top_k": 200, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"frequency_penalty": 0.7, "logit_bias": {3: 2.5, 8: -100}, "logprobs": 0},
    {"temperature": 2.0, "seed": 6, "min_p": 0.03, "min_tokens": 4, "stop_token_ids": [4]},
]


def mixed_states():
    return [state(range(30), [5, 9, 9], (2,), **settings) for settings in MIXED]


@pytest.mark.parametrize("vocab", [509, 4096, 3 * SHORT_HEAD + 1])
def test_a_row_is_bit_identical_alone_and_in_any_company(vocab):
    logits = random_logits(len(MIXED), vocab=vocab, seed=9)
    alone = [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(mixed_states())]
    assert sample(logits, mixed_states()) == alone
    backwards = list(reversed(range(len(MIXED))))
    states = mixed_states()
    assert sample(logits[backwards], [states[i] for i in backwards]) == alone[::-1]
    every_other = slice(0, None, 2)
    assert sample(logits[every_other], mixed_states()[every_other]) == alone[every_other]


@pytest.mark.parametrize("vocab", [250, 4097])
def test_a_distribution_is_bit_identical_alone_and_in_any_company(vocab):
    logits = random_logits(len(DISTRIBUTIONS), vocab=vocab, seed=10)
    params = [SamplingParams(**{"temperature": 1.0, **settings}) for settings in DISTRIBUTIONS]
    together = probabilities(logits, params)
    for row, one in enumerate(params):
        assert torch.equal(probabilities(logits[row : row + 1], [one])[0], together[row])


def test_top_logprobs_of_tied_tokens_do_not_depend_on_what_others_ask_for():
    logits = random_logits(4, scale=1.0, seed=11).round()
    asked = [2, 400, 7, 0]
    together = sample(logits, [state(logprobs=k) for k in asked])
    for row, k in enumerate(asked):
        assert sample(logits[row : row + 1], [state(logprobs=k)])[0] == together[row]


# Penalties, bias, blocked ids


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_output():
    logits = random_logits(1, seed=12)
    prompt, output = [3, 3, 50, 400], [7, 50, 7]
    ours = adjusted(logits[0], state(prompt, output, repetition_penalty=1.7))
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits)[0]
    assert torch.equal(ours, theirs)


def test_presence_and_frequency_penalties_count_the_output_only():
    logits = random_logits(1, vocab=20, seed=13)[0]
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4, 19]
    for repetition in (1.0, 1.5):
        ours = adjusted(
            logits,
            state(
                prompt,
                output,
                presence_penalty=0.4,
                frequency_penalty=-0.3,
                repetition_penalty=repetition,
            ),
        )
        for token_id, value in enumerate(logits.tolist()):
            if token_id in prompt + output:
                value = value / repetition if value > 0 else value * repetition
            value -= 0.4 * (token_id in output) - 0.3 * output.count(token_id)
            assert ours[token_id] == pytest.approx(value)


def test_bias_comes_before_penalties():
    logits = torch.tensor([-1.0, 1.0, 0.0])
    ours = adjusted(logits, state([0, 1], logit_bias={0: 3.0, 2: -5.0}, repetition_penalty=2.0))
    assert ours.tolist() == [1.0, 0.5, -5.0]


def test_penalties_and_bias_decide_greedy_choices_and_draws():
    logits = torch.tensor([[5.0, 4.0, 0.0]])
    assert sample(logits, [state(output_ids=[0, 0], frequency_penalty=1.0)])[0].token_id == 1
    assert sample(logits, [state(logit_bias={2: 100})])[0].token_id == 2
    assert sample(logits, [state(logit_bias={2: 100}, temperature=1.0)])[0].token_id == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_end_the_output_are_blocked_until_min_tokens(temperature):
    logits = torch.tensor([[50.0, 40.0, 30.0]])
    one = state(
        min_tokens=2, stop_token_ids=[1], eos_token_ids=[0, 99], temperature=temperature, seed=0
    )
    assert one.stop_ids == {0, 1, 99}
    chosen = []
    for _ in range(3):
        chosen.append(sample(logits, [one])[0].token_id)
        one.observe(chosen[-1])
    assert chosen == [2, 2, 0]


def test_end_of_sequence_is_an_ordinary_token_when_ignored():
    one = state(min_tokens=2, stop_token_ids=[1], eos_token_ids=[0], ignore_eos=True)
    assert one.stop_ids == {1}
    assert sample(torch.tensor([[50.0, 60.0, 30.0]]), [one])[0].token_id == 0


# Log-probabilities


def test_logprobs_are_those_of_the_untouched_distribution():
    logits = random_logits(3, seed=14)
    expected = logits.log_softmax(dim=-1)
    results = sample(
        logits,
        [
            state(logprobs=4, temperature=0.5, top_k=2, seed=1),
            state(logprobs=0, logit_bias={int(logits[1].argmax()): -100.0}),
            state(),
        ],
    )
    assert results[0].logprob == expected[0, results[0].token_id]
    values, ids = expected[0].topk(4)
    assert results[0].top_logprobs == list(zip(ids.tolist(), values.tolist(), strict=True))
    assert results[1].token_id != int(logits[1].argmax())
    assert results[1].logprob == expected[1, results[1].token_id]
    assert results[1].top_logprobs == []
    assert (results[2].logprob, results[2].top_logprobs) == (None, None)


# Broken logits


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1, "logprobs": 1}], ids=str)
@pytest.mark.parametrize("broken", ["nan", "inf", "all -inf"])
def test_a_row_without_a_finite_choice_is_marked_and_spares_the_others(settings, broken):
    logits = random_logits(3, seed=15)
    healthy = [sample(logits[i : i + 1], [state(**settings)])[0] for i in (0, 2)]
    if broken == "all -inf":
        logits[1] = -math.inf
    else:
        logits[1, 17] = float(broken)
    first, middle, last = sample(logits, [state(**settings) for _ in range(3)])
    assert middle == Sampled(-1, finite=False)
    assert [first, last] == healthy
    assert first.finite
