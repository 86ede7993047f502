"""DuoAttention: which heads are streaming, from gates in a file."""

import pytest
import torch

from tamis.errors import PlanError
from tamis.methods.heads.duoattention import DuoAttention
from tests.methods.heads.fitted import shape_of, write


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_the_lowest_gates_are_streaming(tmp_path, seed, sparsity):
    gates = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    write(tmp_path, "duoattention", gates=gates)
    streaming = DuoAttention(sparsity=sparsity).streaming(shape_of(tmp_path))
    threshold = torch.quantile(gates, sparsity)  # as the paper puts it
    for layer, heads in enumerate(streaming):
        assert heads.tolist() == [bool(gate < threshold) for gate in gates[layer]]


def test_sparsity_zero_leaves_all_heads_full_and_one_none(tmp_path):
    write(tmp_path, "duoattention", gates=torch.rand(3, 4))
    assert not any(h.any() for h in DuoAttention(sparsity=0.0).streaming(shape_of(tmp_path)))
    assert all(h.all() for h in DuoAttention(sparsity=1.0).streaming(shape_of(tmp_path)))


def test_equal_gates_do_not_change_how_many_are_streaming(tmp_path):
    write(tmp_path, "duoattention", gates=torch.ones(3, 4))
    streaming = DuoAttention().streaming(shape_of(tmp_path))
    assert sum(int(heads.sum()) for heads in streaming) == 6


def test_layers_with_a_window_are_left_alone_and_not_counted(tmp_path):
    gates = torch.tensor([[0.9, 0.1], [0.0, 0.0], [0.8, 0.2]])
    write(tmp_path, "duoattention", gates=gates)
    streaming = DuoAttention().streaming(shape_of(tmp_path, (2, 2, 2), windows=(1,)))
    assert [h.tolist() for h in streaming] == [[False, True], [False, False], [False, True]]


def test_layers_may_have_fewer_heads(tmp_path):
    gates = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.3]])
    write(tmp_path, "duoattention", gates=gates)
    streaming = DuoAttention(sparsity=0.4).streaming(shape_of(tmp_path, (2, 3)))
    assert [h.tolist() for h in streaming] == [[False, True], [False, True, False]]


def test_it_acts_in_the_prompt_and_keeps_sinks_and_recent_tokens():
    method = DuoAttention()
    assert method.during_prefill
    assert not method.compensate
    assert method.span(10) == method.span(100_000) == (64, 256)


def test_the_file_can_be_named(tmp_path):
    file = write(tmp_path, "elsewhere", gates=torch.rand(3, 4))
    named = DuoAttention(path=str(file))
    assert len(named.streaming(shape_of(None))) == 3


def test_without_a_fit_the_error_says_what_to_run(tmp_path):
    with pytest.raises(PlanError, match="tamis train duoattention --model"):
        DuoAttention().streaming(shape_of(tmp_path))
    with pytest.raises(PlanError, match=r"no directory.*tamis train duoattention"):
        DuoAttention().streaming(shape_of(None))


def test_gates_of_another_model_are_refused(tmp_path):
    file = write(tmp_path, "duoattention", gates=torch.rand(2, 4))
    with pytest.raises(PlanError, match=r"\[3, 4\].*\[2, 4\].*another model"):
        DuoAttention().streaming(shape_of(tmp_path))
    write(tmp_path, "duoattention", other=torch.rand(3, 4))
    with pytest.raises(PlanError, match="nothing"):
        DuoAttention().streaming(shape_of(tmp_path))
    file.write_bytes(b"no safetensors")
    with pytest.raises(PlanError, match="cannot read"):
        DuoAttention().streaming(shape_of(tmp_path))


@pytest.mark.parametrize("wrong", [{"sparsity": 1.5}, {"recent": 0}, {"sinks": -1}, {"path": 3}])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(PlanError, match=next(iter(wrong))):
        DuoAttention(**wrong)
