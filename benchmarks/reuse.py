"""Retrieved chunks of text in front of a question: computed with it, or reused as contexts.

    python benchmarks/reuse.py --threads 2 --json benchmarks/results/reuse.json

Time is that to the first token, of a model of random weights: of the whole prompt computed by exact
attention, and of requests that join contexts computed before. Answers are those of the reference
model on tasks whose facts are spread over a document, which is cut into chunks between lines; each
chunk becomes a context. A score is the mean share of the asked values that were named. Where the
answers do not tell plans apart, the continuation of ordinary text does: how many of its tokens are
those of exact attention, up to the first that is not.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from pathlib import Path

import torch
from rich.console import Console

from random_llama import LlamaShape
from report import Row, save, table
from tamis import LLM, SamplingParams
from tamis.bench.exercise import Exercise, exercises_of
from tamis.bench.tasks.corpus import haystack_lines
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.cli.machine import measure_rates, this_machine
from tamis.model import Model, load_model
from tamis.shipped import find
from timing import Spread, in_turns

DENSE = "dense"
PLANS = ("promptcache()", "cacheblend()", "cacheblend(recompute=0.5)")
TASKS = ("multi_key", "multi_query", "variables", "frequent")
PAGE = 64
CONTINUED = 32
"""Tokens of a continuation."""


class Workload:
    """A question over chunks, each of which has been made a context.

    Args:
        model: a loaded model.
        chunks: how many; tokens: of each; question: tokens of the question.
    """

    def __init__(self, model: Model, chunks: int, tokens: int, question: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(n: int) -> list[int]:
            return torch.randint(0, model.vocab_size, (n,), generator=generator).tolist()

        self._chunks = [draw(tokens) for _ in range(chunks)]
        self._question = draw(question)
        n_tokens = 3 * (chunks * tokens + question) + chunks * PAGE
        memory = n_tokens * model.kv_bytes_per_token + (64 << 20)
        self._llm = LLM(model, kv_memory=memory, page_size=PAGE)
        self._contexts = [self._llm.add_context(chunk) for chunk in self._chunks]

    def first_token_s(self, plan: str) -> float:
        """Seconds to the first token under a plan; "dense" computes the whole prompt."""
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        whole = [token for chunk in self._chunks for token in chunk] + self._question
        if plan == DENSE:
            [output] = self._llm.generate([whole], params, plan)
        else:
            [output] = self._llm.generate([self._question], params, plan, context=self._contexts)
        assert output.metrics.ttft_s is not None
        return output.metrics.ttft_s


def chunks_of(document: str, count: int) -> list[str]:
    """A document in so many parts of nearly as many characters, cut between lines."""
    lines, parts, at = document.splitlines(keepends=True), [""], 0
    for line in lines:
        if len(parts) < count and at >= len(parts) * len(document) / count:
            parts.append("")
        parts[-1] += line
        at += len(line)
    return parts


def scores(llm: LLM, exercises: Sequence[Exercise], chunks: int) -> Iterator[tuple[str, float]]:
    """What each plan's answer to each exercise is worth, from 0 to 1."""
    for exercise in exercises:
        end = exercise.text.rindex("\n", 0, exercise.text.rindex("Q: ")) + 1
        document, question = exercise.text[:end], exercise.text[end:]
        ids = [llm.encode(part, begins=not i) for i, part in enumerate(chunks_of(document, chunks))]
        asked = llm.encode(question, begins=False)
        contexts = [llm.add_context(part) for part in ids]
        params = SamplingParams(
            max_tokens=exercise.answer_tokens(lambda text: len(llm.encode(text))),
            stop=exercise.stop,
        )
        whole = [token for part in ids for token in part] + asked
        outputs = llm.generate([whole], params, DENSE)
        for plan in PLANS:
            outputs += llm.generate([asked], params, plan, context=contexts)
        for plan, output in zip((DENSE, *PLANS), outputs, strict=True):
            yield plan, exercise.score(output.text)
        for context in contexts:
            llm.delete_context(context)


def agreements(
    llm: LLM, texts: Sequence[Sequence[int]], chunks: int, question: int
) -> Iterator[tuple[str, float]]:
    """Of every plan and text, the share of its continuation that is as exact attention's."""
    params = SamplingParams(max_tokens=CONTINUED, ignore_eos=True)
    for text in texts:
        end = len(text) - question
        cuts = [i * end // chunks for i in range(chunks + 1)]
        contexts = [llm.add_context(text[a:b]) for a, b in pairwise(cuts)]
        [exact] = llm.generate([list(text)], params, DENSE)
        for plan in PLANS:
            [output] = llm.generate([list(text[end:])], params, plan, context=contexts)
            same = zip(output.token_ids, exact.token_ids, strict=True)
            yield plan, len(list(takewhile(lambda two: two[0] == two[1], same))) / CONTINUED
        for context in contexts:
            llm.delete_context(context)


def plain_texts(llm: LLM, tokens: int, count: int) -> list[list[int]]:
    """Texts of so many tokens, out of what the tasks hide their facts in."""
    lines = haystack_lines(None)
    step = len(lines) // count
    # No line of it has fewer characters than a token has on average.
    texts = ["".join(lines[i * step :])[: 8 * tokens] for i in range(count)]
    return [llm.encode(text)[:tokens] for text in texts]


def time_rows(model: Model, chunks: int, tokens: int, question: int, rounds: int) -> list[Row]:
    """First tokens under every plan against exact attention over the whole prompt."""
    workload = Workload(model, chunks, tokens, question)
    runs = {plan: lambda plan=plan: workload.first_token_s(plan) for plan in (DENSE, *PLANS)}
    in_turns(runs, 1)  # warm
    taken = {plan: Spread.of(samples) for plan, samples in in_turns(runs, rounds).items()}
    return [Row(f"{plan}: first token", "s", taken[plan], taken[DENSE]) for plan in PLANS]


def answer_rows(model: Model, chunks: int, tokens: int, question: int, count: int) -> list[Row]:
    """Scores of every plan against exact attention over the whole prompt, by task; and how far its
    continuations are the same."""
    rows = []
    llm = LLM(model, kv_memory=4 * chunks * tokens * model.kv_bytes_per_token + (64 << 20))
    for task in TASKS:
        suite = Suite(task, chunks * tokens, count)
        exercises = list(exercises_of(make_samples(suite, model.tokenizer)))
        found: dict[str, list[float]] = {plan: [] for plan in (DENSE, *PLANS)}
        for plan, score in scores(llm, exercises, chunks):
            found[plan].append(100 * score)
        means = {plan: sum(worth) / len(worth) for plan, worth in found.items()}
        for plan in PLANS:
            ours, theirs = Spread.of([means[plan]]), Spread.of([means[DENSE]])
            rows.append(Row(f"{plan}: {task}", "%", ours, theirs, higher_is_better=True))
    same: dict[str, list[float]] = {plan: [] for plan in PLANS}
    texts = plain_texts(llm, chunks * tokens + question, 4 * count)
    for plan, share in agreements(llm, texts, chunks, question):
        same[plan].append(100 * share)
    for plan, shares in same.items():
        mean = Spread.of([sum(shares) / len(shares)])
        rows.append(Row(f"{plan}: continued alike", "%", mean, higher_is_better=True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of each chunk, for time")
    parser.add_argument("--question", type=int, default=64, help="tokens of the question")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--judged", type=int, default=1024, help="of each chunk, for answers")
    parser.add_argument("--count", type=int, default=12, help="documents of each task")
    parser.add_argument("--json", type=Path, help="where to write every row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates = measure_rates()
    with tempfile.TemporaryDirectory() as folder:
        LlamaShape().save(Path(folder))
        model = load_model(folder, dtype="auto", device="cpu")
        rows = time_rows(model, args.chunks, args.tokens, args.question, args.rounds)
    reference = find()
    if reference is not None:
        model = load_model(reference, dtype="auto", device="cpu")
        rows += answer_rows(model, args.chunks, args.judged, args.question, args.count)
    Console().print(table(rows, "computed whole"))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        save(args.json, "reuse", this_machine(), rates, settings, rows)


if __name__ == "__main__":
    main()
