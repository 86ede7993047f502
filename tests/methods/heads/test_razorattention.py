"""RazorAttention: which heads retrieve, from the probe's scores in a file."""

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.heads.razorattention import RazorAttention
from tests.methods.heads.fitted import shape_of, write


@pytest.mark.parametrize("seed", range(3))
def test_the_highest_induction_and_echo_scores_stay_full(tmp_path, seed):
    induction, echo = torch.rand(2, 25, 4, generator=torch.Generator().manual_seed(seed))
    write(tmp_path, "razorattention", induction=induction, echo=echo)
    streaming = torch.stack(RazorAttention().streaming(shape_of(tmp_path, (4,) * 25)))
    ranked = [sorted(range(100), key=lambda h: -s.flatten()[h]) for s in (induction, echo)]
    full = set(ranked[0][:14]) | set(ranked[1][:1])  # 14 % and 1 % of 100 heads
    assert set((~streaming).flatten().nonzero()[:, 0].tolist()) == full


def test_small_models_keep_at_least_one_head_of_each_kind(tmp_path):
    induction = torch.tensor([[0.1, 0.9], [0.2, 0.3]])
    write(tmp_path, "razorattention", induction=induction, echo=induction.flip(0))
    streaming = RazorAttention().streaming(shape_of(tmp_path, (2, 2)))
    assert [heads.tolist() for heads in streaming] == [[True, False], [True, False]]


def test_all_shares_one_or_nought(tmp_path):
    write(tmp_path, "razorattention", induction=torch.rand(3, 4), echo=torch.rand(3, 4))
    shape = shape_of(tmp_path)
    assert not any(h.any() for h in RazorAttention(induction=1.0).streaming(shape))
    assert all(h.all() for h in RazorAttention(induction=0.0, echo=0.0).streaming(shape))


def test_layers_with_a_window_are_left_alone_and_not_counted(tmp_path):
    scores = torch.tensor([[0.1, 0.2], [0.9, 0.8]])
    write(tmp_path, "razorattention", induction=scores, echo=scores.clone())
    streaming = RazorAttention().streaming(shape_of(tmp_path, (2, 2), windows=(1,)))
    assert [heads.tolist() for heads in streaming] == [[True, False], [False, False]]


@pytest.mark.parametrize(("prompt", "recent"), [(10, 4000), (20_000, 4000), (100_000, 20_000)])
def test_the_buffer_is_a_fifth_of_a_long_prompt(prompt, recent):
    method = RazorAttention()
    assert method.span(prompt) == (4, recent)
    assert method.compensate
    assert not method.during_prefill


def test_without_a_fit_the_error_says_what_to_run(tmp_path):
    with pytest.raises(PlanError, match="tamis train razorattention --model"):
        RazorAttention().streaming(shape_of(tmp_path))


@pytest.mark.parametrize("wrong", [{"induction": 1.5}, {"echo": -0.1}, {"ratio": 0.5}])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(PlanError, match=next(iter(wrong))):
        RazorAttention(**wrong)
