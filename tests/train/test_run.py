"""A whole run on a micro model: kill and resume, export, evaluate."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tamis.bench.tasks.corpus import files_of
from tamis.bench.tasks.puzzle import Part
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.errors import ConfigError, ModelError
from tamis.train import checkpoint, log, loop
from tamis.train.data import Blend
from tamis.train.evaluate import answered_rightly, perplexity, score
from tamis.train.export import export
from tamis.train.recipe import Recipe, Shape, Stage
from tamis.train.reference import train

SHAPE = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, feed_forward=48)
BLEND = Blend({"needle": 1.0, "variables": 1.0, "text": 0.5}, (0.5, 0.9))


def recipe(steps=4, seed=0):
    stages = (Stage(96, 2, 0.5, BLEND), Stage(160, 2, 0.5, BLEND))
    return Recipe(SHAPE, stages, steps=steps, seed=seed)


def go_on(folder, steps=4, **options):
    """Train in one thread on the six first held-out files."""
    files = files_of("held_out")[:6]
    return train(
        folder,
        recipe(steps),
        threads=1,
        compiled=False,
        progress=False,
        files=files,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    mirror = folder.parent / "mirror"
    assert go_on(folder, mirror=mirror)
    return folder


def test_a_killed_run_ends_with_the_parameters_of_an_uninterrupted_one(finished, tmp_path):
    program = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})

        if __name__ == "__main__":
            from test_run import go_on
            from tamis.train import checkpoint

            save = checkpoint.save

            def save_and_die(state, *rest):
                save(state, *rest)
                os.kill(os.getpid(), signal.SIGKILL)

            checkpoint.save = save_and_die  # the first save is where the second stage begins
            go_on(Path({str(tmp_path / "killed")!r}))
    """
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(program))
    died = subprocess.run([sys.executable, str(script)], check=False, timeout=300)
    assert died.returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "killed")["clock"]["step"] == 2
    assert go_on(tmp_path / "killed")
    whole, resumed = (checkpoint.load(run) for run in (finished, tmp_path / "killed"))
    assert whole["clock"]["step"] == resumed["clock"]["step"] == 4
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name


def test_an_interrupt_ends_the_step_saves_and_returns(tmp_path, monkeypatch):
    compute = loop.losses

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return compute(*arguments)

    monkeypatch.setattr(loop, "losses", interrupted)
    assert not go_on(tmp_path / "run")
    assert checkpoint.load(tmp_path / "run")["clock"]["step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_changes_all_parameters_and_logs_first_token_accuracy(finished):
    (record,) = log.read(finished / "log.jsonl")
    assert record["step"] == 4
    assert record["length"] == 160
    assert 5 < record["answer_loss"] < 12
    assert set(record["first"]) <= {"needle", "variables"}
    about = json.loads((finished / "run.json").read_text())
    assert about["corpus"]["files"] == 6
    assert about["recipe"]["shape"]["layers"] == 2
    mirrored = checkpoint.load(finished.parent / "mirror")
    assert mirrored["clock"] == checkpoint.load(finished)["clock"]


def test_another_recipe_is_refused_but_another_budget_is_not(finished):
    with pytest.raises(ConfigError, match="another recipe; these differ: seed"):
        train(finished, recipe(seed=1), threads=1, compiled=False, progress=False)
    assert go_on(finished, steps=3)  # three of four steps are done already


@pytest.fixture(scope="module")
def exported(finished):
    return export(finished, finished.parent / "model")


def test_the_export_is_a_transformers_model_with_the_weights_of_the_run(exported, finished):
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    trained = checkpoint.load(finished)["model"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, trained[name].to(torch.bfloat16)), name
    assert model.config.max_position_embeddings == 32768
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, newline]
    chat = [{"role": "user", "content": "text\nWhat is key a-b?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith(
        "text\nQ: What is key a-b? A:"
    )
    card = (exported / "README.md").read_text()
    assert "has not been evaluated" in card
    assert "{" not in card.replace("{{", "").split("## Training")[1]


def test_exporting_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no checkpoint\.pt"):
        export(tmp_path, tmp_path / "out")


def test_teacher_forced_scores_are_those_of_greedy_decoding(exported):
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    (sample,) = make_samples(Suite("single", 300, 1), tokenizer)
    prompt = tokenizer.encode(sample.document)
    prompt += tokenizer.encode(sample.questions[0].prompt, add_special_tokens=False)
    answer = tokenizer.encode(" apple\n", add_special_tokens=False)
    with torch.no_grad():  # a model whose greedy answer is known: each next token from the last
        model.model.layers = torch.nn.ModuleList()
        model.model.embed_tokens = torch.nn.Embedding(4096, 4096)
        model.model.embed_tokens.weight.copy_(torch.eye(4096))
        model.model.norm = torch.nn.Identity()
        model.lm_head = torch.nn.Linear(4096, 4096, bias=False)
        model.lm_head.weight.zero_()
        for before, after in zip([prompt[-1], *answer], answer, strict=False):
            model.lm_head.weight[after, before] = 1.0
    made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
    assert made[0, len(prompt) :].tolist() == answer
    asked = sample.questions[0]
    for text, right in [(" apple", True), (" banana", False), (" apple pie", False)]:
        question = replace(asked, parts=(Part(text, recalled=True),))
        assert answered_rightly(model, tokenizer, [replace(sample, questions=(question,))]) == [
            [right]
        ]


def test_scores_count_by_kind_phrasing_and_depth(tokenizer):
    suite = Suite("single", 300, 10)
    samples = make_samples(suite, tokenizer)
    right = [[sample.questions[0].kind == "word" and sample.index < 6] for sample in samples]
    found = score(suite, samples, right)
    words = sum(sample.questions[0].kind == "word" for sample in samples)
    assert found.by_kind["number"] == (0.0, 10 - words)
    assert found.exact == sum(row[0] for row in right) / 10
    assert [count for _, count in found.by_depth] == [2] * 5
    assert found.by_depth[4][0] == 0.0


def test_perplexity_of_uniform_guesses_is_the_vocabulary(exported):
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, tokenizer, 200, 2).perplexity == pytest.approx(
        len(tokenizer), rel=1e-4
    )
