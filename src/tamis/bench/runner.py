"""Answering: every plan on every exercise, batched, appended as answers come, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from tamis.bench.completed import Order, as_completed
from tamis.bench.exercise import Exercise
from tamis.bench.results import Answer, ResultFile
from tamis.engine.outputs import RequestOutput
from tamis.errors import ConfigError
from tamis.llm import LLM
from tamis.plan import Plan
from tamis.sampling import SamplingParams


@dataclass(frozen=True)
class Prompting:
    """How an exercise's text becomes token ids.

    Attributes:
        chat: as a user's message in the model's chat template; texts to be continued are not.
        truncate: a published prompt longer than the context loses its middle, where it would be
            refused otherwise.
    """

    chat: bool = False
    truncate: bool = False

    def encode(self, llm: LLM, exercise: Exercise) -> list[int]:
        """The token ids of an exercise's prompt.

        Raises:
            ConfigError: prompt and answer are longer than the model's context.
            RequestError: the model has no tokenizer, or no chat template where one is asked for.
        """
        wrapped = self.chat and not exercise.completion
        encode = _in_template if wrapped else LLM.encode
        prompt = encode(llm, exercise.text)
        limit = llm.model.max_length
        room = limit - exercise.answer_tokens(lambda text: len(llm.encode(text)))
        if len(prompt) <= room or (exercise.length is not None and len(prompt) < limit):
            return prompt
        if self.truncate and exercise.length is None and room > 1:
            return prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]
        where = f" ({exercise.source})" if exercise.source else ""
        raise ConfigError(
            f"task {exercise.task!r}{where} needs {len(prompt) + limit - room:,} tokens with its "
            f"answer, but the model's context is {limit:,}"
            + ("; --truncate cuts the middle out of such prompts" if exercise.source else "")
        )


@dataclass(frozen=True)
class Work:
    """What a run still has to do.

    Attributes:
        exercises: all of them. `plans`: by the name they have in results.
        done: keys of the answers that are already there, each with the digest of its prompt.
    """

    exercises: Sequence[Exercise]
    plans: dict[str, Plan]
    done: frozenset[tuple[object, ...]]

    def __iter__(self) -> Iterator[tuple[str, Exercise]]:
        """The pairs of plan and exercise left, cell by cell, short documents first."""
        for exercise in sorted(self.exercises, key=_cell_order):
            for plan in self.plans:
                if (*_key(plan, exercise), exercise.digest) not in self.done:
                    yield plan, exercise

    @property
    def characters(self) -> int:
        """Characters of all prompts left: known before any is encoded, and near enough to time."""
        return sum(len(exercise.text) for _, exercise in self)


def open_work(
    exercises: Sequence[Exercise], plans: dict[str, Plan], answers: Iterable[Answer]
) -> Work:
    """The work left where some answers are there.

    What failed is tried again, and what was another prompt then (a file has changed) is answered.
    """
    done = frozenset((*a.key, a.prompt_digest) for a in answers if a.error is None)
    return Work(exercises, plans, done)


def check_work(llm: LLM, work: Work, prompting: Prompting) -> None:
    """Find out before a long run what would end it: nothing is computed.

    Raises:
        ConfigError: a published prompt is longer than the model's context.
        RequestError, KVMemoryError: the longest prompt cannot be run.
    """
    left = list(work)
    for exercise in {id(e): e for _, e in left if e.source}.values():
        prompting.encode(llm, exercise)
    if left:
        longest = max((exercise for _, exercise in left), key=lambda e: len(e.text))
        prompt, params = _request(llm, longest, prompting)
        for plan in work.plans.values():
            llm.engine.abort(llm.engine.add_request(prompt, params, plan))


def run_answers(
    llm: LLM,
    work: Work,
    prompting: Prompting,
    file: ResultFile[Answer],
    advance: Callable[[int], None],
) -> None:
    """Answer all that is left, appending each answer to `file` the moment it ends.

    Args:
        advance: called with the characters of a prompt that was answered.

    Raises:
        ConfigError: a prompt is longer than the model's context.
        RequestError, KVMemoryError: a prompt cannot be run.
    """
    orders = (
        Order((name, exercise), *_request(llm, exercise, prompting), work.plans[name])
        for name, exercise in work
    )
    with closing(as_completed(llm, orders)) as completed:  # frees the pages of a run cut short
        for (plan, exercise), output in completed:
            file.append(_answer(plan, exercise, output))
            advance(len(exercise.text))


def _request(
    llm: LLM, exercise: Exercise, prompting: Prompting
) -> tuple[list[int], SamplingParams]:
    params = SamplingParams(
        max_tokens=exercise.answer_tokens(lambda text: len(llm.encode(text))),
        stop=() if prompting.chat else exercise.stop,
    )
    return prompting.encode(llm, exercise), params


def _answer(plan: str, exercise: Exercise, output: RequestOutput) -> Answer:
    failed = output.finish_reason == "error"
    return Answer(
        plan=plan,
        task=exercise.task,
        length=exercise.length,
        sample=exercise.sample,
        question=exercise.question,
        depth=exercise.depth,
        kind=exercise.kind,
        phrasing=exercise.phrasing,
        prompt_digest=exercise.digest,
        prompt_tokens=output.metrics.prompt_tokens,
        output_tokens=output.metrics.output_tokens,
        expected=list(exercise.expected),
        answer=output.text,
        score=None if failed else exercise.score(output.text),
        exact=None if failed else exercise.is_exact(output.text),
        kv_bytes=output.metrics.kv_bytes,
        kv_bytes_peak=output.metrics.kv_bytes_peak,
        kv_bytes_dense=output.metrics.kv_bytes_dense,
        error=output.error if failed else None,
    )


def _key(plan: str, exercise: Exercise) -> tuple[object, ...]:
    return (plan, exercise.task, exercise.length, exercise.sample, exercise.question)


def _cell_order(exercise: Exercise) -> tuple[float, str, int, int]:
    """Published exercises, whose lengths are not known beforehand, come last."""
    length = float("inf") if exercise.length is None else exercise.length
    return (length, exercise.task, exercise.sample, exercise.question)


def _in_template(llm: LLM, text: str) -> list[int]:
    return llm.encode_chat([{"role": "user", "content": text}])
