"""How well a model answers: greedy exact match on the tasks, and perplexity of held-out text.

Answers are scored by teacher forcing: the right answer is fed to the model, and counts if the most
likely token was right at every place. That is the case exactly when greedy decoding would have
written this answer and ended the line, and it takes one forward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as HFTokenizer

from tamis.bench.tasks.corpus import files_of
from tamis.bench.tasks.puzzle import Question
from tamis.bench.tasks.samples import Sample, Suite, make_samples

_TOKENS_AT_ONCE = 16384
_DEPTHS = 5
_WINDOWS = ((1024, 32), (2048, 24), (4096, 16), (8192, 8), (16384, 5))  # length, how many


@dataclass(frozen=True)
class Score:
    """Exact match of one task at one length; `by_*` split the same answers (share right, count)."""

    task: str
    length: int
    count: int
    exact: float
    by_kind: dict[str, tuple[float, int]]
    by_phrasing: dict[str, tuple[float, int]]
    by_depth: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Perplexity:
    """Of held-out library text in windows of `length` tokens; bits per character of that text."""

    length: int
    windows: int
    perplexity: float
    bits_per_character: float


def evaluate(
    model: PreTrainedModel, tokenizer: HFTokenizer, suites: Iterable[Suite]
) -> Iterable[Score]:
    """Score the model on every suite, one after the other."""
    for suite in suites:
        samples = make_samples(suite, tokenizer, context=model.config.max_position_embeddings)
        yield score(suite, samples, answered_rightly(model, tokenizer, samples))


def score(suite: Suite, samples: Sequence[Sample], right: Sequence[Sequence[bool]]) -> Score:
    """Sum up: right[i][j] says whether question j of sample i was answered exactly."""
    rows: list[tuple[Question, float, bool]] = [
        (question, depth, ok)
        for sample, oks in zip(samples, right, strict=True)
        for question, depth, ok in zip(sample.questions, sample.depths, oks, strict=True)
    ]

    def share(chosen: list[bool]) -> tuple[float, int]:
        return (sum(chosen) / len(chosen) if chosen else math.nan, len(chosen))

    return Score(
        task=suite.task,
        length=suite.length,
        count=len(rows),
        exact=share([ok for _, _, ok in rows])[0],
        by_kind={kind: share([ok for q, _, ok in rows if q.kind == kind]) for kind in suite.kinds},
        by_phrasing={
            phrasing: share([ok for q, _, ok in rows if q.phrasing == phrasing])
            for phrasing in suite.phrasings
        },
        by_depth=tuple(
            share([ok for _, d, ok in rows if min(_DEPTHS - 1, int(d * _DEPTHS)) == part])
            for part in range(_DEPTHS)
        ),
    )


def answered_rightly(
    model: PreTrainedModel, tokenizer: HFTokenizer, samples: Sequence[Sample]
) -> list[list[bool]]:
    """For every sample and each of its questions, asked alone: is the greedy answer exact?"""
    prompts: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        document = tokenizer.encode(sample.document)
        for question in sample.questions:
            prompt = tokenizer.encode(question.prompt, add_special_tokens=False)
            answer = tokenizer.encode(question.answer + "\n", add_special_tokens=False)
            prompts.append((document + prompt, answer))
    flat: list[bool] = []
    longest = max(len(prompt) + len(answer) for prompt, answer in prompts)
    size = max(1, _TOKENS_AT_ONCE // longest)
    for begin in range(0, len(prompts), size):
        flat += _greedy_exact(model, prompts[begin : begin + size])
    found: list[list[bool]] = []
    for sample in samples:
        found.append(flat[: len(sample.questions)])
        flat = flat[len(sample.questions) :]
    return found


@torch.inference_mode()
def _greedy_exact(
    model: PreTrainedModel, prompts: Sequence[tuple[list[int], list[int]]]
) -> list[bool]:
    """Rows are padded at their end, where causal attention keeps the padding out of sight."""
    rows = [prompt + answer[:-1] for prompt, answer in prompts]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    hidden: Tensor = model.base_model(input_ids=tokens.to(model.device)).last_hidden_state
    right: list[bool] = []
    for row, (prompt, answer) in enumerate(prompts):
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        best = model.get_output_embeddings()(hidden[row, at]).argmax(-1).cpu()
        right.append(bool((best == torch.tensor(answer)).all()))
    return right


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokenizer: HFTokenizer, length: int, windows: int
) -> Perplexity:
    """Perplexity of `windows` evenly spaced windows of held-out text, each read on its own."""
    text = "".join(file.text for file in files_of("held_out"))
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    characters = len(text) / len(tokens)
    first = torch.tensor([tokenizer.bos_token_id])
    total = 0.0
    for window in range(windows):
        start = window * (len(tokens) - length) // max(1, windows - 1)
        row = torch.cat([first, tokens[start : start + length - 1]]).to(model.device)
        hidden = model.base_model(input_ids=row[None]).last_hidden_state[0, :-1]
        parts = zip(torch.split(hidden, 2048), torch.split(row[1:], 2048), strict=True)
        for part, targets in parts:
            logits = model.get_output_embeddings()(part).float()
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    nats = total / (windows * (length - 1))
    return Perplexity(length, windows, math.exp(nats), nats / math.log(2) / characters)


def card_suites(seed: int = 99, *, quick: bool = False) -> list[Suite]:
    """The suites of the model card: all tasks at 2k and 4k, fewer samples and tasks beyond."""
    counts = {2048: 64, 4096: 48, 8192: 24, 16384: 20}
    if quick:
        counts = {1024: 16, 4096: 8}
    tasks = (
        "single",
        "multi_key",
        "key_value",
        "multi_query",
        "multi_value",
        "multi_value_unnumbered",
        "variables",
        "frequent",
        "multi_turn",
    )
    long = ("single", "multi_key", "key_value", "variables", "multi_turn")
    return [
        Suite(task, length, count // 4 if task == "multi_turn" else count, seed=seed)
        for length, count in counts.items()
        for task in (tasks if length <= 8192 else long)
    ]


def evaluate_folder(
    folder: Path, *, quick: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Evaluate the model in `folder`, and write `evaluation.json` there as results come in.

    `say` gets one line per result.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    path = folder / "evaluation.json"
    scores: list[Score] = []
    ppl: list[Perplexity] = []

    def save() -> None:
        found = {"scores": [asdict(s) for s in scores], "perplexity": [asdict(p) for p in ppl]}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for one in evaluate(model, tokenizer, card_suites(quick=quick)):
        scores.append(one)
        kinds = " ".join(f"{k}:{v[0]:.2f}" for k, v in (one.by_kind | one.by_phrasing).items())
        say(f"{one.task:24} {one.length:6} {one.exact:6.1%}  n={one.count}  {kinds}")
        save()
    for length, windows in _WINDOWS[:1] if quick else _WINDOWS:
        ppl.append(perplexity(model, tokenizer, length, windows))
        say(f"held-out perplexity {length:6} {ppl[-1].perplexity:.2f}")
        save()
    return path
