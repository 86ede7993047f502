"""RoPE that depends on a sequence's length is exact in any batch and any chunking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tamis.model import Model, load_model
from tamis.model.rope import dynamic_modules
from tests.model.naive import NaiveAttend
from tests.tiny_models import GQA, build

ORIGINAL = 32
"""The trained length of the tiny models with scaled RoPE."""


def longrope_llama() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    }
    config = LlamaConfig(**GQA | {"max_position_embeddings": 128}, rope_parameters=rope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


MODELS = {
    "dynamic": lambda: build("llama-dynamic"),
    "longrope": longrope_llama,
    "phi3-longrope": lambda: build("phi3-longrope"),
}


def greedy(model: Model, prompts: list[Tensor], n_new: int) -> tuple[list[list[int]], Tensor]:
    """Continue all prompts in one batch; ids, and logits [n_new, sequences, vocab]."""
    attend, rows = NaiveAttend(), []
    owners = [i for i, prompt in enumerate(prompts) for _ in prompt]
    positions = [at for prompt in prompts for at in range(len(prompt))]
    lengths = [len(prompt) for prompt in prompts for _ in prompt]
    ids, last = torch.cat(prompts), torch.tensor([len(p) for p in prompts]).cumsum(0) - 1
    sizes, new = [len(prompt) for prompt in prompts], []
    for _ in range(n_new):
        attend.owners, attend.positions = owners, positions
        rows.append(
            model.forward(ids, torch.tensor(positions), last, attend, torch.tensor(lengths))
        )
        ids, last = rows[-1].argmax(-1), torch.arange(len(prompts))
        new.append(ids)
        owners, positions = list(range(len(prompts))), list(sizes)
        sizes = [size + 1 for size in sizes]
        lengths = list(sizes)
    return torch.stack(new, dim=1).tolist(), torch.stack(rows)


def generated_alone(hf: PreTrainedModel, prompt: Tensor, n_new: int) -> tuple[list[int], Tensor]:
    """What Transformers' generate makes of one prompt: ids, and logits [n_new, vocab]."""
    out = hf.generate(
        prompt[None],
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@pytest.mark.parametrize("name", MODELS)
def test_generation_in_a_batch_equals_generate_of_each_prompt_alone(name, tmp_path):
    hf = MODELS[name]()
    hf.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="fp32", device="cpu")
    assert model.dynamic_rope
    generator = torch.Generator().manual_seed(3)
    # Longer than trained, far longer, and short enough to stay within what was trained.
    lengths = [ORIGINAL + 9, 2 * ORIGINAL, 5]
    if name != "phi3-longrope":  # Phi-3's generate recomputes a cache that grows beyond it
        lengths.append(ORIGINAL - 3)
    prompts = [torch.randint(0, 256, (length,), generator=generator) for length in lengths]
    ids, logits = greedy(model, prompts, n_new=8)
    for i, prompt in enumerate(prompts):
        alone, alone_logits = generated_alone(MODELS[name](), prompt, n_new=8)
        torch.testing.assert_close(logits[:, i], alone_logits, atol=1e-4, rtol=0)
        assert ids[i] == alone


def test_a_longer_sequence_before_does_not_change_a_shorter_one(tiny_dir):
    model = load_model(tiny_dir("llama-dynamic"), dtype="fp32", device="cpu")
    generator = torch.Generator().manual_seed(4)
    longer, shorter = (torch.randint(0, 256, (n,), generator=generator) for n in (120, 40))
    first = greedy(model, [shorter], n_new=1)[1]
    greedy(model, [longer], n_new=1)
    assert torch.equal(greedy(model, [shorter], n_new=1)[1], first)


def test_a_chunk_alone_would_choose_other_frequencies(tiny_dir):
    model = load_model(tiny_dir("llama-dynamic"), dtype="fp32", device="cpu")
    ids = torch.arange(20)

    def logits(length: int) -> Tensor:
        attend = NaiveAttend()
        attend.owners, attend.positions = [0] * 20, list(range(20))
        return model.forward(ids, ids, ids[-1:], attend, torch.full_like(ids, length))

    assert not torch.allclose(logits(20), logits(64), atol=1e-2)


def test_the_lengths_are_required_where_they_matter(tiny_dir):
    model = load_model(tiny_dir("llama-dynamic"), dtype="fp32", device="cpu")
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="rope_lengths must be"):
        model.forward(ids, ids, ids[-1:], NaiveAttend())


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "llama-linear", "llama-yarn", "gemma3"])
def test_fixed_frequencies_need_no_lengths(name, tiny_dir):
    assert not load_model(tiny_dir(name), dtype="fp32", device="cpu").dynamic_rope


def test_a_forward_leaves_no_hook_behind(tiny_dir):
    model = load_model(tiny_dir("llama-dynamic"), dtype="fp32", device="cpu")
    greedy(model, [torch.arange(40)], n_new=1)
    (rotary,) = dynamic_modules(model.hf)
    assert not rotary._forward_hooks
