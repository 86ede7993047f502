"""DuoAttention's gates are learned by gradient descent on the model as it is."""

import pytest
import torch

from tamis.attention import prefill
from tamis.errors import ModelError
from tamis.model import load_model
from tamis.train.methods import duoattention
from tamis.train.methods.differentiable import causal_attention
from tamis.train.methods.duoattention import GatedAttention, Setting

TOKENS, DIM = 30, 8


def tensors():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(TOKENS, heads, DIM, generator=generator) for heads in (4, 2, 2))


def attend(gates):
    q, k, v = tensors()
    gated = GatedAttention([gates], sinks=2, recent=5)
    return gated(0, q, k, v, scale=0.3, window=None, softcap=None, sinks=None)


def test_gates_mix_full_and_streaming_attention_head_by_head():
    q, k, v = tensors()
    full, _ = prefill(q, k, v, None, scale=0.3, positions=torch.arange(TOKENS))
    streaming = causal_attention(q, k, v, scale=0.3, first_tokens=2, recent_tokens=5)
    mixed = attend(torch.tensor([0.75, 0.0]))
    torch.testing.assert_close(mixed[:, :2], 0.75 * full[:, :2] + 0.25 * streaming[:, :2])
    torch.testing.assert_close(mixed[:, 2:], streaming[:, 2:])
    torch.testing.assert_close(attend(None), full)


@pytest.fixture(scope="module")
def model(tiny_dir):
    return load_model(tiny_dir("llama"), dtype="fp32", device="cpu")


@pytest.fixture
def few_documents(monkeypatch):
    """Two documents of random tokens in place of conversations, which take 1500 tokens and more."""

    def conversations(model, length, *, haystack, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(256, (64,), generator=generator), torch.arange(40, 64)

    monkeypatch.setattr(duoattention, "conversations", conversations)


def test_open_gates_change_nothing_and_only_gates_are_learned(model):
    gates = [torch.ones(2, requires_grad=True) for _ in range(3)]
    ids, asked = torch.arange(60), torch.arange(50, 60)
    setting = Setting(sinks=2, recent=8)
    assert float(duoattention._distance(model, gates, ids, asked, setting).detach()) < 1e-10
    closed = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    distance = duoattention._distance(model, closed, ids, asked, setting)
    distance.backward()
    assert float(distance.detach()) > 0.01
    assert all(gate.grad.abs().min() > 0 for gate in closed)
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_it_closes_gates_that_cost_more_than_they_help(model, few_documents):
    reports = []
    setting = Setting(sinks=2, recent=8, penalty=10.0, rate=0.2)
    learned = duoattention.fit(model, setting, steps=12, report=reports.append)
    assert learned.finished
    assert learned.gates.shape == (3, 2)
    assert learned.gates.max() < 0.1
    assert [report.step for report in reports] == list(range(1, 13))
    free = duoattention.fit(model, Setting(sinks=2, recent=8, penalty=0.0), steps=3)
    assert free.gates.min() > 0.95


def test_an_interrupted_fit_keeps_what_it_has_learned(model, few_documents):
    def interrupt(report):
        if report.step == 2:
            raise KeyboardInterrupt

    learned = duoattention.fit(model, Setting(recent=8), steps=50, report=interrupt)
    assert (learned.steps, learned.finished) == (2, False)
    assert 0.9 < learned.gates.min() < 1.0


def test_layers_with_a_window_keep_their_gates(tiny_dir, few_documents):
    gemma = load_model(tiny_dir("gemma3"), dtype="fp32", device="cpu")
    learned = duoattention.fit(gemma, Setting(recent=8), steps=2)
    assert (learned.gates[[0, 2]] == 1).all()  # sliding, full, sliding
    assert (learned.gates[1] < 1).all()


def test_a_model_with_nothing_to_learn_is_refused(tiny_dir):
    mistral = load_model(tiny_dir("mistral"), dtype="fp32", device="cpu")
    with pytest.raises(ModelError, match=r"all layers of .* have a sliding window"):
        duoattention.fit(mistral, Setting(), steps=1)


def test_a_model_without_a_tokenizer_is_refused(tiny_dir):
    bare = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    bare.tokenizer = None
    with pytest.raises(ModelError, match="no tokenizer"):
        duoattention.fit(bare, Setting(), steps=1)
