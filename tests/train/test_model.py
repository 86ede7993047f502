"""The training forward computes what the Transformers model does."""

import torch

from tamis.train.model import build_model, logits_at
from tamis.train.recipe import Shape

MICRO = Shape(layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, feed_forward=48)


def test_logits_at_selected_positions_are_those_of_the_whole_model(tokenizer):
    model = build_model(MICRO, tokenizer, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter), alpha=1.0 if "norm" in name else 2.0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (2, 40), generator=generator)
    positions = torch.arange(40).repeat(2, 1)
    positions[1, 17:] += 900
    where = torch.stack([torch.randperm(40, generator=generator)[:9].sort()[0] for _ in range(2)])
    selected = logits_at(model, tokens, positions, where, dtype=torch.float32)
    whole = model(input_ids=tokens, position_ids=positions).logits
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(selected, whole[rows, where], atol=1e-4, rtol=1e-4)
    moved = model(input_ids=tokens).logits
    assert (moved[1, -1] - whole[1, -1]).abs().max() > 1e-3  # the jump in positions mattered


def test_a_new_model_attends_to_what_followed_the_same_key_before(tokenizer):
    model = build_model(Shape(), tokenizer, seed=3)
    text = "key amber-falcon = walnut\nkey icy-reef = moon\nkey jolly-tiger = 481\nkey icy-reef ="
    ids = tokenizer.encode(text)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    first, second = attentions[0][0], attentions[1][0]
    tokens = torch.arange(4, len(ids))
    assert (first[0, tokens, tokens - 1] > 0.6).all()
    assert (first[1, tokens, tokens - 2] > 0.6).all()
    (moon,) = tokenizer.encode(" moon", add_special_tokens=False)
    assert second[0, -1, ids.index(moon)] > 0.3
    assert int(second[0, -1].argmax()) == ids.index(moon)


def test_a_seed_decides_the_weights(tokenizer):
    first, again, other = (build_model(MICRO, tokenizer, seed) for seed in (0, 0, 1))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
