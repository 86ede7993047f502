"""RazorAttention's probe finds heads that look for repetitions, and measures them exactly."""

import pytest
import torch

from tamis.methods.heads.razorattention import RazorAttention
from tamis.methods.views import LayerShape, ModelShape
from tamis.model import load_model
from tamis.train.methods import razorattention
from tamis.train.methods.razorattention import RepetitionProbe
from tamis.train.methods.save import save

PERIOD, REPEATS, DIM = 5, 4, 16


def naive_scores(q, k, period, scale, window, softcap, sinks):
    """Echo and induction score of every query head, from whole softmax rows."""
    n, q_heads, _ = q.shape
    echo, induction = torch.zeros(q_heads), torch.zeros(q_heads)
    for head in range(q_heads):
        own = k[:, head // (q_heads // k.shape[1])]
        for i in range(period, n):
            seen = [j for j in range(i + 1) if window is None or j > i - window]
            scores = scale * own[seen] @ q[i, head]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            weight = dict(zip(seen, scores.softmax(0).tolist(), strict=False))
            for j in range(i - period, -1, -period):
                echo[head] += weight.get(j, 0.0) / (n - period)
                induction[head] += weight.get(j + 1, 0.0) / (n - period)
    return echo, induction


@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(None, None, None), (12, None, None), (None, 1.5, torch.tensor([0.5, 1.0, -1.0, 0.0]))],
)
def test_scores_are_the_attention_to_earlier_occurrences_and_what_followed_them(
    window, softcap, sinks
):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(PERIOD * REPEATS, 4, DIM, generator=generator)
    k, v = torch.randn(2, PERIOD * REPEATS, 2, DIM, generator=generator)
    probe = RepetitionProbe(PERIOD)
    out = probe(0, q, k, v, scale=0.5, window=window, softcap=softcap, sinks=sinks)
    assert out.shape == q.shape
    expected = naive_scores(q, k, PERIOD, 0.5, window, softcap, sinks)
    for found, per_query_head in zip((probe.echo, probe.induction), expected, strict=True):
        torch.testing.assert_close(found[0], per_query_head.view(2, 2).amax(1))


def test_it_tells_an_echo_head_from_an_induction_head():
    tokens = torch.eye(DIM)[torch.randperm(DIM, generator=torch.Generator().manual_seed(1))]
    text = tokens.repeat(REPEATS, 1)
    before = text.roll(1, 0)
    q = torch.stack([text, text], 1)  # both look for the current token:
    k = torch.stack([text, before], 1)  # the first finds it, the second what follows it
    probe = RepetitionProbe(DIM)
    probe(0, q, k, k, scale=20.0, window=None, softcap=None, sinks=None)
    assert probe.echo[0][0] > 0.6
    assert probe.echo[0][1] < 0.01
    assert probe.induction[0][1] > 0.6
    assert probe.induction[0][0] < 0.01


def test_a_fit_can_be_used_by_the_method(tiny_dir, tmp_path):
    model = load_model(tiny_dir("gemma3"), dtype="fp32", device="cpu")
    found = razorattention.fit(model, tokens=20, repeats=3, seed=1)
    again = razorattention.fit(model, tokens=20, repeats=3, seed=1)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert all((scores[1] > 0).all() for scores in found.values())
    assert all((scores[[0, 2]] == 0).all() for scores in found.values())  # beyond their windows
    save(found, tmp_path / "tamis", "razorattention", {"seed": 1})
    layers = tuple(
        LayerShape(one.q_heads, one.kv_heads, one.k_dim, one.v_dim, one.window)
        for one in model.layers
    )
    shape = ModelShape(layers, model.vocab_size, model.dtype, tmp_path)
    streaming = RazorAttention().streaming(shape)
    assert [len(heads) for heads in streaming] == [2, 2, 2]
    assert not streaming[0].any()  # it has a sliding window


def test_the_probe_fits_a_short_context(tiny_dir):
    model = load_model(tiny_dir("llama-linear"), dtype="fp32", device="cpu")  # 128 tokens
    assert razorattention.fit(model)["echo"].shape == (3, 2)
