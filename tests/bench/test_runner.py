"""Every plan answers every exercise once, and a run that was cut short goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tamis import LLM, Plan, SamplingParams
from tamis.bench.exercise import Exercise
from tamis.bench.results import Answer, ResultFile
from tamis.bench.runner import Prompting, check_work, open_work, run_answers
from tamis.bench.suites import generated, published
from tamis.bench.tasks.samples import Suite
from tamis.errors import ConfigError, KVMemoryError

PLANS = {"dense": Plan(), "dense too": Plan()}


@pytest.fixture(scope="module")
def exercises(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> list[Exercise]:
    suites = [Suite("single", 128, 3), Suite("single", 200, 2), Suite("key_value", 200, 2)]
    return generated(llm, suites, tmp_path_factory.mktemp("samples"))


def run(
    llm: LLM,
    exercises: list[Exercise],
    path: Path,
    plans: dict[str, Plan] = PLANS,
    prompting: Prompting = Prompting(),  # noqa: B008
) -> tuple[int, list[Answer]]:
    """How many exercises this run answered, and all answers in the file after it."""
    done: list[int] = []
    with ResultFile(path, Answer) as file:
        run_answers(llm, open_work(exercises, plans, file.rows), prompting, file, done.append)
        return len(done), file.rows


def test_every_plan_answers_every_exercise_as_the_api_does(
    llm: LLM, exercises: list[Exercise], tmp_path: Path
) -> None:
    count, answers = run(llm, exercises, tmp_path / "answers.jsonl")

    assert count == len(answers) == len({a.key for a in answers}) == 2 * len(exercises)
    found = {(a.plan, a.task, a.length, a.sample): a for a in answers}
    for exercise in exercises:
        params = SamplingParams(
            max_tokens=exercise.answer_tokens(lambda text: len(llm.encode(text))), stop="\n"
        )
        (output,) = llm.generate([exercise.text], params)
        for plan in PLANS:
            answer = found[plan, exercise.task, exercise.length, exercise.sample]
            assert answer.answer == output.text
            assert answer.score == exercise.score(output.text)
            assert answer.expected == list(exercise.expected)
            assert answer.prompt_tokens == len(llm.encode(exercise.text))
            assert answer.kv_bytes_peak == output.metrics.kv_bytes_peak > 0
            assert answer.error is None


def test_a_killed_run_goes_on_with_what_is_missing_and_ends_the_same(
    llm: LLM, exercises: list[Exercise], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    _, whole = run(llm, exercises, path)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:60])

    count, resumed = run(llm, exercises, path)

    assert count == len(whole) - 5
    assert {a.key: a for a in resumed} == {a.key: a for a in whole}
    assert [json.loads(line) for line in path.read_text().splitlines()][:5] == [
        json.loads(line) for line in lines[:5]
    ]
    assert run(llm, exercises, path)[0] == 0


def test_an_interrupted_run_keeps_its_answers_and_frees_all_pages(
    llm: LLM, exercises: list[Exercise], tmp_path: Path
) -> None:
    seen: list[int] = []

    def interrupt(characters: int) -> None:
        seen.append(characters)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with ResultFile(tmp_path / "answers.jsonl", Answer) as file:
        work = open_work(exercises, PLANS, file.rows)
        with pytest.raises(KeyboardInterrupt):
            run_answers(llm, work, Prompting(), file, interrupt)
    assert llm.engine.idle
    assert llm.engine.cache.bytes_in_use == 0

    with ResultFile(tmp_path / "answers.jsonl", Answer) as file:
        assert len(file.rows) == 3


def test_more_plans_and_exercises_add_to_what_is_there(
    llm: LLM, exercises: list[Exercise], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    assert run(llm, exercises[:2], path, {"dense": Plan()})[0] == 2
    assert run(llm, exercises[:3], path, PLANS)[0] == 4


def test_failed_and_changed_exercises_are_answered_again(
    llm: LLM, exercises: list[Exercise], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    plans = {"dense": Plan()}
    _, answers = run(llm, exercises[:3], path, plans)
    failed = replace(answers[0], score=None, exact=None, error="no memory")
    assert len(list(open_work(exercises[:3], plans, [failed, *answers[1:]]))) == 1

    changed = [replace(exercises[0], text=exercises[0].text + "!"), *exercises[1:3]]
    assert len(list(open_work(changed, plans, answers))) == 1


def test_a_failing_request_is_recorded_without_a_score(
    llm: LLM, exercises: list[Exercise], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("the forward broke")

    monkeypatch.setattr(llm.model, "forward", fail)
    _, (answer,) = run(llm, exercises[:1], tmp_path / "answers.jsonl", {"dense": Plan()})
    assert (answer.score, answer.exact) == (None, None)
    assert answer.error == "RuntimeError: the forward broke"


def ruler_file(tmp_path: Path, *texts: str) -> Path:
    path = tmp_path / "niah_single_1.jsonl"
    path.write_text("".join(json.dumps({"input": t, "outputs": ["7"]}) + "\n" for t in texts))
    return path


def test_a_published_prompt_beyond_the_context_is_refused_before_anything_runs(
    llm: LLM, tmp_path: Path
) -> None:
    path = ruler_file(tmp_path, "short", "x" * 600)
    work = open_work(published({"ruler": [path]}, 10), PLANS, ())
    with pytest.raises(ConfigError) as error:
        check_work(llm, work, Prompting())
    message = str(error.value)
    assert f"{path}, line 2" in message
    assert "729 tokens" in message  # 600 bytes, a beginning of sequence, 128 of answer
    assert "context is 512" in message
    check_work(llm, work, Prompting(truncate=True))


def test_truncation_takes_the_middle_out(llm: LLM, tmp_path: Path) -> None:
    path = ruler_file(tmp_path, "b" * 300 + "m" * 300 + "e" * 300)
    (exercise,) = published({"ruler": [path]}, 10)
    prompt = Prompting(truncate=True).encode(llm, exercise)
    whole = llm.encode(exercise.text)
    assert len(prompt) == 512 - 128
    assert prompt == whole[:192] + whole[-192:]


def test_the_chat_template_wraps_instructions_but_not_texts_to_be_continued(
    llm: LLM, exercises: list[Exercise]
) -> None:
    one = exercises[0]
    expected = llm.encode_chat([{"role": "user", "content": one.text}])
    assert Prompting(chat=True).encode(llm, one) == expected
    continued = replace(one, completion=True)
    assert Prompting(chat=True).encode(llm, continued) == llm.encode(one.text)


def test_too_little_kv_memory_is_found_out_before_anything_runs(
    llm: LLM, exercises: list[Exercise]
) -> None:
    small = LLM(llm.model, kv_memory=64 * 2**10, page_size=16)
    with pytest.raises(KVMemoryError, match="would do"):
        check_work(small, open_work(exercises, PLANS, ()), Prompting())


def test_tasks_longer_than_the_context_are_refused_with_the_limit(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'single' at length 505 .* context is 512"):
        generated(llm, [Suite("single", 505, 1)], tmp_path)


def test_a_folder_for_samples_that_cannot_be_made_is_named(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot keep samples in .*file/samples"):
        generated(llm, [Suite("single", 128, 1)], tmp_path / "file" / "samples")


def test_two_files_of_one_task_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [ruler_file(tmp_path / name, "text") for name in "ab"]
    with pytest.raises(ConfigError, match="are both sample 0 of ruler/niah_single_1"):
        published({"ruler": files}, 10)


def test_only_the_first_lines_of_a_file_are_taken(tmp_path: Path) -> None:
    path = ruler_file(tmp_path, "a", "b", "c")
    assert [e.text for e in published({"ruler": [path]}, 2)] == ["a", "b"]
