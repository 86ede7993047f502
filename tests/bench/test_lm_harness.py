"""lm-eval gets from tamis what Transformers' own model gives."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tamis import LLM, SamplingParams
from tamis.errors import ConfigError, RequestError
from tests import tiny_models
from tests.tiny_models import BOS

pytest.importorskip("lm_eval", reason="the evaluation harness is not installed (extra: eval)")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry

from tamis.bench.lm_harness import TamisLM, register

LONG = "".join(f"line {i}: {i * i % 97}\n" for i in range(100))  # some windows of the model
LIMIT = 512
CASES = [
    ("The sieve", " holds"),
    ("two words ", "and a space"),
    ("", "from nothing"),
    ("größer", " naïve €"),
    (LONG, " the end"),
]


@pytest.fixture(scope="module")
def model(tiny_dir: Callable[[str], Path]) -> Path:
    return tiny_dir("llama")


@pytest.fixture(scope="module")
def lm(model: Path) -> TamisLM:
    return TamisLM(str(model), dtype="float32", kv_memory="16MiB")


@pytest.fixture(scope="module")
def hf(tiny_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama")


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def tokens(text: str) -> list[int]:
    """One per byte, as the tiny models' tokenizer has it, without the beginning of a text."""
    return tiny_models.tokenizer()(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def logprobs(hf: PreTrainedModel, ids: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Of every token but the first: its log-probability, and whether it is the most likely."""
    found = hf(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(ids[1:])
    chosen = found.gather(1, targets[:, None])[:, 0].tolist()
    return chosen, (found.argmax(-1) == targets).tolist()


def test_loglikelihoods_are_those_of_transformers(lm: TamisLM, hf: PreTrainedModel) -> None:
    found = lm.loglikelihood(requests("loglikelihood", *CASES), disable_tqdm=True)

    for (context, continuation), (logprob, greedy) in zip(CASES, found, strict=True):
        ids = [BOS, *tokens(context + continuation)][-(LIMIT - 1) :]
        spaces = len(context) - len(context.rstrip())  # the harness moves them to the continuation
        count = len(tokens(continuation)) + spaces
        chosen, best = logprobs(hf, ids)
        assert logprob == pytest.approx(math.fsum(chosen[-count:]), abs=1e-3)
        assert greedy == all(best[-count:])


def test_what_greedy_decoding_says_is_known_as_that(lm: TamisLM, model: Path) -> None:
    llm = LLM(model, dtype="float32", kv_memory="16MiB")
    (output,) = llm.generate("The sieve", SamplingParams(max_tokens=3), progress=False)
    prompt = [BOS, *tokens("The sieve")]
    other = [*output.token_ids[:2], (output.token_ids[2] + 1) % 256]

    pairs = [(None, prompt, output.token_ids), (None, prompt, other)]
    (_, greedy), (_, changed) = lm._loglikelihood_tokens(pairs, disable_tqdm=True)

    assert (greedy, changed) == (True, False)


@pytest.mark.parametrize("text", ["short", LONG], ids=["one window", "several windows"])
def test_rolling_scores_every_token_once(lm: TamisLM, hf: PreTrainedModel, text: str) -> None:
    (found,) = lm.loglikelihood_rolling(requests("rolling", (text,)), disable_tqdm=True)

    ids = [BOS, *tokens(text)]
    window = LIMIT - 2
    expected = []
    for begin in range(1, len(ids), window):
        end = min(begin + window, len(ids))
        chosen, _ = logprobs(hf, ids[max(0, end - window - 1) : end])
        expected += chosen[-(end - begin) :]
    assert len(expected) == len(ids) - 1
    assert found == pytest.approx(math.fsum(expected), abs=1e-3)


def test_texts_are_told_apart(lm: TamisLM) -> None:
    texts = [("one",), (LONG,), ("three",)]
    together = lm.loglikelihood_rolling(requests("rolling", *texts), disable_tqdm=True)
    alone = [
        lm.loglikelihood_rolling(requests("rolling", text), disable_tqdm=True)[0] for text in texts
    ]

    assert together == pytest.approx(alone, abs=1e-4)


def test_generation_is_that_of_llm(lm: TamisLM, model: Path) -> None:
    llm = LLM(model, dtype="float32", kv_memory="16MiB")
    (free,) = llm.generate("The sieve", SamplingParams(max_tokens=12), progress=False)
    stop = free.text[4:6]
    asked = [
        ("The sieve", {"until": [stop], "max_gen_toks": 12}),
        ("The sieve", {"until": [], "max_new_tokens": 5, "do_sample": False, "temperature": 0.7}),
        ("Another", {"max_gen_toks": 9, "do_sample": True, "temperature": 0.7, "seed": 3}),
        ("Another", {"max_gen_toks": 9, "do_sample": True, "seed": 3}),
    ]
    expected = [
        SamplingParams(max_tokens=12, stop=[stop]),
        SamplingParams(max_tokens=5),
        SamplingParams(max_tokens=9, temperature=0.7, seed=3),
        SamplingParams(max_tokens=9, temperature=1.0, seed=3),
    ]

    answers = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)

    outputs = llm.generate([text for text, _ in asked], expected, progress=False)
    assert answers == [output.text for output in outputs]
    assert answers[0] == free.text[: free.text.index(stop)]


def test_a_prompt_too_long_loses_its_beginning(lm: TamisLM, model: Path) -> None:
    llm = LLM(model, dtype="float32", kv_memory="16MiB")
    kept = [BOS, *tokens(LONG)][-(LIMIT - 20) :]

    asked = requests("generate_until", (LONG, {"max_gen_toks": 20}))
    (answer,) = lm.generate_until(asked, disable_tqdm=True)

    assert answer == llm.generate([kept], SamplingParams(max_tokens=20), progress=False)[0].text


def test_a_conversation_begins_once(lm: TamisLM, model: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    llm = LLM(model, dtype="float32", kv_memory="16MiB")

    assert lm.tok_encode(lm.apply_chat_template(messages)) == llm.encode_chat(messages)
    begun = [*messages, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("It is")
    assert lm.chat_template(True) == tiny_models.CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 4}, "the task sets num_beams; tamis takes"),
        ({"max_gen_toks": 512}, "answers of 512 tokens, and the context is 512"),
    ],
)
def test_a_task_that_cannot_be_answered_is_explained(
    lm: TamisLM, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        lm.generate_until(requests("generate_until", ("x", settings)), disable_tqdm=True)


def test_a_continuation_longer_than_the_context_is_refused(lm: TamisLM) -> None:
    with pytest.raises(RequestError, match="cannot be scored"):
        lm.loglikelihood(requests("loglikelihood", ("x", LONG)), disable_tqdm=True)


def test_model_arguments_are_checked(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names nonsense; tamis takes pretrained, plan"):
        TamisLM(str(model), nonsense=1)
    bare = tiny_models.save("llama", tmp_path, with_tokenizer=False)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        TamisLM(str(bare), kv_memory="16MiB")


def test_the_harness_finds_it_by_name() -> None:
    register()
    register()
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    ((name, value),) = project["project"]["entry-points"]["lm_eval.models"].items()

    assert model_registry.get("tamis") is TamisLM
    assert EntryPoint(name, value, "lm_eval.models").load() is TamisLM


@pytest.mark.slow
def test_the_command_evaluates_local_tasks_without_a_network(
    model: Path, hf: PreTrainedModel, tmp_path: Path
) -> None:
    rows = [
        {"q": "The sieve", "c": [" holds", " leaks"], "a": 0},
        {"q": "A page", "c": [" of one head", " of none", " burns"], "a": 2},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    choice = {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    for task in (choice, rolling):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(shared | task))  # JSON is YAML
    arguments = {
        "pretrained": str(model),
        "plan": "dense",
        "dtype": "float32",
        "kv_memory": "16MiB",
    }

    command = [
        sys.executable,
        "-m",
        "tamis",
        "lm-eval",
        "--include_path",
        str(tmp_path),
        "--tasks",
        "choice,rolling",
        "--output_path",
        str(tmp_path / "out.json"),
        "--model_args",
        ",".join(f"{key}={value}" for key, value in arguments.items()),
    ]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out_*.json")
    results = json.loads(path.read_text())["results"]
    right = []
    for row in rows:
        scores = []
        for answer in row["c"]:
            chosen, _ = logprobs(hf, [BOS, *tokens(row["q"] + answer)])
            scores.append(math.fsum(chosen[-len(tokens(answer)) :]))
        right.append(scores.index(max(scores)) == row["a"])
    assert results["choice"]["acc,none"] == sum(right) / len(right)
    nats = math.fsum(math.fsum(logprobs(hf, [BOS, *tokens(row["q"])])[0]) for row in rows)
    n_bytes = sum(len(row["q"]) for row in rows)
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(
        math.exp(-nats / n_bytes), rel=1e-4
    )
