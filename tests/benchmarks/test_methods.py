"""The benchmark of the methods has a plan for each, measures what it says, and its page is true."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import methods
import methods_page
import methods_parts
from methods_parts import Remaining, Settings
from methods_plans import BUDGETS, DENSE, QUEST, SETTINGS, SNAPKV, Setting
from methods_summary import GOALS, goal_rows, quality_rows, timing_rows
from methods_timing import Bench, Case, Request, Round
from tamis import LLM
from tamis.bench.results import Answer, ResultFile
from tamis.bench.runner import open_work
from tamis.bench.suites import generated
from tamis.bench.tasks.samples import Suite
from tamis.errors import ConfigError, RequestError
from tamis.methods.base import Evict
from tamis.plan import Plan


@pytest.fixture(scope="module")
def bench(shape, tmp_path_factory) -> Bench:
    return Bench(shape, tmp_path_factory.mktemp("bench"), short=100)


CASE = Case(200, rounds=1, new_tokens=6)


def a_round(plan: str = SNAPKV, length: int = 32_768, **others) -> Round:
    one = Round(
        plan=plan,
        length=length,
        repeat=0,
        output_tokens=6,
        ttft_s=1.0,
        tpot_s=0.001,
        dense_ttft_s=2.0,
        dense_tpot_s=0.004,
        kv_bytes=100,
        kv_bytes_peak=200,
        kv_bytes_dense=400,
        timeline=[(1.0, 200), (1.1, 100)],
        short_tpot_s=0.001,
    )
    return replace(one, **others)


def an_answer(plan: str, score: float | None, **others) -> Answer:
    one = Answer(
        plan=plan,
        task="single",
        length=4096,
        sample=0,
        question=0,
        depth=0.5,
        kind="word",
        phrasing="natural",
        prompt_digest="0",
        prompt_tokens=4096,
        output_tokens=3,
        expected=["word"],
        answer="word",
        score=score,
        exact=None if score is None else score == 1,
        kv_bytes=25,
        kv_bytes_peak=100,
        kv_bytes_dense=100,
    )
    return replace(one, **others)


def test_every_method_has_one_setting_in_the_order_of_the_stages():
    kinds = methods_page.own_methods().items()
    measured = [name for name, kind in kinds if kind.stage != "reuse"]  # benchmarks/reuse.py does
    assert [setting.method for setting in SETTINGS] == measured


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.method)
def test_a_settings_plans_contain_its_method(setting: Setting):
    for text in (*setting.timed, *setting.judged):
        assert setting.method in [m.method_name() for m in Plan.parse(text).methods]
    assert len(setting.judged) in (1, len(BUDGETS))
    assert len(set(setting.judged)) == len(setting.judged)


def test_goals_are_about_plans_that_are_timed():
    timed = {plan for setting in SETTINGS for plan in setting.timed}
    assert {plan for goal in GOALS for plan in goal.plans} <= timed


def test_a_round_times_a_plan_beside_exact_attention(bench):
    row = bench.compare("snapkv(budget=64, window=8)", replace(CASE, length=300), 0)
    assert row.output_tokens == 6
    assert row.kv_bytes < row.kv_bytes_dense / 2
    assert row.kv_bytes_peak >= row.kv_bytes
    assert min(row.ttft_s, row.tpot_s, row.dense_tpot_s, row.short_tpot_s) > 0
    assert row.timeline[-1][1] == row.kv_bytes
    seconds = [at for at, _ in row.timeline]
    assert seconds == sorted(seconds)
    assert seconds[0] <= row.ttft_s + 1e-6 < seconds[-1]


def test_exact_attention_is_timed_beside_itself(bench):
    row = bench.compare(DENSE, CASE, 1)
    assert row.ttft_s != row.dense_ttft_s
    assert row.kv_bytes == row.kv_bytes_peak == row.kv_bytes_dense


def test_a_slow_plan_is_stopped_early_and_measured(bench):
    case = replace(CASE, new_tokens=40, patience_s=0.0)
    row = bench.compare("h2o(budget=32)", case, 0)
    assert row.output_tokens == 9
    assert 0 < row.kv_bytes < row.kv_bytes_dense
    assert row.tpot_s > 0


def test_plans_may_share_a_prompt_of_exact_attention(bench):
    case = replace(CASE, exact_every=2)
    plans = (DENSE, "h2o(budget=32)", "streamingllm(budget=32)")
    one, two, three = (bench.compare(plan, case, 0) for plan in plans)
    assert one.dense_ttft_s == two.dense_ttft_s != three.dense_ttft_s
    assert one.dense_tpot_s != two.dense_tpot_s
    assert bench.compare(DENSE, case, 1).dense_ttft_s != three.dense_ttft_s


def test_no_prompt_is_given_twice(bench, monkeypatch):
    prompts = []
    init = Request.__init__

    def recorded(self, llm, prompt, *others):
        prompts.append(tuple(prompt))
        init(self, llm, prompt, *others)

    monkeypatch.setattr(Request, "__init__", recorded)
    bench.warm_up(DENSE)
    for plan in (DENSE, "h2o(budget=32)"):
        bench.compare(plan, CASE, 0)
    assert len(prompts) == len(set(prompts)) == 9


def test_fitted_methods_run_on_random_weights(bench):
    for plan in ("duoattention(recent=8)", "razorattention(buffer=8)"):
        assert bench.compare(plan, CASE, 0).kv_bytes > 0


def test_a_round_leaves_no_page_behind(bench):
    bench.compare("h2o(budget=32)", CASE, 0)
    engines = (bench._planned, bench._dense, bench._short)
    assert [llm.engine.cache.bytes_in_use for llm in engines] == [0, 0, 0]


def test_seconds_per_token_count_the_tokens_of_a_step():
    request = object.__new__(Request)
    request._steps = [(0.002, 1), (0.004, 3), (0.1, 2)]
    assert request.tpot_s == pytest.approx(0.004 / 2)


def small(**others) -> Settings:
    cases = (Case(64, rounds=2, new_tokens=4), Case(128, rounds=1, new_tokens=4, exact_every=2))
    return replace(Settings(), cases=cases, short=32, **others)


def test_all_lengths_and_methods_are_timed_once_before_any_twice():
    rounds = small().rounds([Setting("a", ("a()", "b()"), ())])
    assert [(plan, case.length, repeat) for plan, case, repeat in rounds] == [
        ("dense", 64, 0),
        ("a()", 64, 0),
        ("b()", 64, 0),
        ("dense", 128, 0),
        ("a()", 128, 0),
        ("b()", 128, 0),
        ("dense", 64, 1),
        ("a()", 64, 1),
        ("b()", 64, 1),
    ]


def test_the_time_left_follows_from_the_work_done():
    times = iter((0.0, 30.0, 3000.0))
    remaining = Remaining(10.0, clock=lambda: next(times))
    remaining.done(4.0)
    assert str(remaining) == "45 s left"
    remaining.done(1.0)
    assert str(remaining) == "50 min left"


def test_a_run_goes_on_where_it_stopped_and_past_a_plan_that_fails(shape, tmp_path):
    wanted, said = small(shape=shape), io.StringIO()
    settings = [Setting("x", ("kivi(group_size=60)", "snapkv(budget=16, window=4)"), ())]
    path = tmp_path / "timings.jsonl"
    with ResultFile(path, Round) as file:
        failures = methods_parts.time_plans(wanted, settings, file, Console(file=said))
        assert list(failures) == ["kivi(group_size=60)"]
        assert len(file.rows) == 6
    assert said.getvalue().count("left") == 6
    assert said.getvalue().count("FAILED") == 1
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"length": 128' not in line) + "\n")
    with ResultFile(path, Round) as file:
        methods_parts.time_plans(wanted, settings, file, Console(file=io.StringIO()))
        assert [row.key for row in file.rows[4:]] == [
            ("dense", 128, 0),
            ("snapkv(budget=16, window=4)", 128, 0),
        ]
        assert isinstance(file.rows[0], Round)


def test_a_bug_in_one_plan_ends_no_other(shape, tmp_path, monkeypatch):
    compare = Bench.compare

    def broken(self, plan, case, repeat):
        if plan != DENSE:
            raise IndexError("beyond the end")
        return compare(self, plan, case, repeat)

    monkeypatch.setattr(Bench, "compare", broken)
    wanted = replace(small(shape=shape), cases=(Case(64, rounds=2, new_tokens=4),))
    settings = [Setting("x", ("h2o(budget=16)",), ())]
    with ResultFile(tmp_path / "timings.jsonl", Round) as file:
        failures = methods_parts.time_plans(wanted, settings, file, Console(file=io.StringIO()))
        assert failures == {"h2o(budget=16)": "IndexError: beyond the end"}
        assert [row.key for row in file.rows] == [(DENSE, 64, 0), (DENSE, 64, 1)]


class Broken(Evict):
    """An eviction that cannot score."""

    paper = ""
    budget = 16

    def scores(self, view):
        raise ValueError("no scores")


def test_a_request_that_fails_says_which_plan_and_why(directory):
    llm = LLM(directory, kv_memory="64MiB")
    with pytest.raises(RequestError, match=r"broken.*no scores"):
        Request(llm, [0] * 100, Plan.parse(Broken()), 3)
    assert llm.engine.cache.bytes_in_use == 0


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="snapvk"):
        methods.chosen(["snapvk"])
    assert [setting.method for setting in methods.chosen(["snapkv", "quest"])] == [
        "snapkv",
        "quest",
    ]


def test_the_ratio_of_a_goal_is_that_of_the_longest_prompts():
    rounds = [
        a_round(length=8192, tpot_s=9.0),
        a_round(tpot_s=0.0011),
        a_round(QUEST, tpot_s=0.002),
    ]
    snapkv, quest = goal_rows(rounds, judged=True)
    assert snapkv.ratio == pytest.approx(1.1)
    assert snapkv.met is True
    assert quest.ratio == pytest.approx(0.5)
    assert quest.met is False
    assert [row.met for row in goal_rows(rounds, judged=False)] == [None, None]


def test_any_prefill_method_reaches_the_goal_of_prefill():
    slow, fast = GOALS[2].plans
    rounds = [a_round(slow, ttft_s=3.0), a_round(fast, ttft_s=0.5)]
    (row,) = goal_rows(rounds, judged=True)
    assert fast in row.name
    assert row.ratio == 0.25
    assert row.met is True


def test_repeated_rounds_become_medians():
    rounds = [a_round(repeat=i, ttft_s=t) for i, t in enumerate((1.0, 4.0, 2.0))]
    (row,) = timing_rows(rounds)
    assert row["ttft_s"] == {"median": 2.0, "low": 1.0, "high": 4.0, "n": 3}
    assert row["ttft_ratio"]["median"] == 1.0
    assert row["kv_bytes"] == 100


def test_scores_are_means_by_task_and_failures_are_counted():
    answers = [
        an_answer(DENSE, 1.0),
        an_answer("a()", 1.0),
        an_answer("a()", 0.0, sample=1),
        an_answer("a()", 1.0, task="multi_key"),
        an_answer("a()", None, task="multi_key", sample=1, error="broken"),
    ]
    dense, row = quality_rows(answers)
    assert dense["score"] == 1.0
    assert row["scores"] == {"single": 0.5, "multi_key": 1.0}
    assert row["score"] == 0.75
    assert (row["answers"], row["failed"]) == (3, 1)
    assert row["kv_share"] == 0.25


@pytest.fixture(scope="module")
def reference() -> LLM:
    return LLM("reference", kv_memory="256MiB")


def test_answers_are_given_once_and_what_failed_is_tried_again(reference, tmp_path):
    exercises = generated(reference, [Suite("single", 256, 2)], tmp_path / "samples")
    settings = [Setting("x", (), ("snapkv(budget=0.5)",))]
    said = io.StringIO()
    with ResultFile(tmp_path / "answers.jsonl", Answer) as file:
        left = methods_parts.work_left(exercises, settings, file.rows)
        assert list(left) == [DENSE, "snapkv(budget=0.5)"]
        assert methods_parts.judge_plans(reference, left, file, Console(file=said)) == {}
        assert len(file.rows) == 4
        assert "answers 2/2: snapkv(budget=0.5): score" in said.getvalue()
        assert methods_parts.work_left(exercises, settings, file.rows) == {}
        file.append(replace(file.rows[-1], score=None, error="broken"))
        failed = replace(file.rows[-1], plan="h2o()")
        assert methods_parts.work_left(exercises, settings, [*file.rows[:4], failed]) == {}


def test_a_plan_that_cannot_answer_ends_no_other(reference, tmp_path):
    exercises = generated(reference, [Suite("single", 256, 1)], tmp_path / "samples")
    plans = {"broken": Plan.parse(Broken()), DENSE: Plan()}
    left = {name: open_work(exercises, {name: plan}, ()) for name, plan in plans.items()}
    said = io.StringIO()
    with ResultFile(tmp_path / "answers.jsonl", Answer) as file:
        failures = methods_parts.judge_plans(reference, left, file, Console(file=said))
        assert list(failures) == ["broken"]
        assert "no scores" in failures["broken"]
        assert [row.score is None for row in file.rows] == [True, False]
    assert "answers 1/2: broken: 1 FAILED" in said.getvalue()


@pytest.fixture
def tiny(shape, monkeypatch):
    """The sizes of a run that takes seconds."""
    wanted = small(shape=shape, tasks=("single",), judged_lengths=(256,), samples=1)
    monkeypatch.setattr(methods, "Settings", lambda threads: wanted)
    app = typer.Typer()
    app.command()(methods.main)
    return lambda *given: CliRunner().invoke(app, [*map(str, given), "--threads", "1"])


def test_parts_of_a_run_complete_each_other(tiny, tmp_path):
    given = ("--only", "snapkv", "--out", tmp_path, "--json", tmp_path / "summary.json")

    def run(*others):
        found = tiny(*given, *others)
        assert found.exit_code == 0, found.output
        return json.loads((tmp_path / "summary.json").read_text()), found.output

    timed, _ = run("--timings-only")
    assert list(timed["runs"]) == ["timings"]
    assert len(timed["timings"]) == 4
    assert timed["quality"] == []
    both, output = run("--quality-only")
    assert list(both["runs"]) == ["timings", "answers"]
    assert both["timings"] == timed["timings"]
    assert [row["plan"] for row in both["quality"]] == [
        DENSE, *(f"snapkv(budget={share})" for share in BUDGETS),
    ]  # fmt: skip
    assert "snapkv" in output
    again, output = run()
    assert again == both
    assert "times " not in output
    assert "answers " not in output


def test_times_of_another_machine_are_not_gone_on_with(tiny, tmp_path):
    given = ("--timings-only", "--out", tmp_path, "--json", tmp_path / "summary.json")
    assert tiny("--only", "snapkv", *given).exit_code == 0
    record = json.loads((tmp_path / "timings.json").read_text())
    record["machine"]["processor"] = "an abacus"
    (tmp_path / "timings.json").write_text(json.dumps(record))
    found = tiny("--only", "quest", *given)
    assert found.exit_code == 1
    assert "an abacus" in found.output


def test_an_interrupted_run_says_how_it_goes_on(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "compare", interrupted)
    found = tiny("--out", tmp_path / "out", "--json", tmp_path / "summary.json")
    assert found.exit_code == 130
    assert "the same command goes on" in found.output
    assert not (tmp_path / "summary.json").exists()


def test_two_parts_that_exclude_each_other_are_refused(tiny, tmp_path):
    found = tiny("--timings-only", "--quality-only", "--out", tmp_path)
    assert found.exit_code == 1
    assert "nothing to measure" in found.output


@pytest.fixture
def results(tmp_path) -> methods_page.Results:
    rounds = [a_round(DENSE, tpot_s=0.004, ttft_s=2.0, kv_bytes=400), a_round(kv_bytes=50)]
    answers = [
        an_answer(DENSE, 1.0),
        an_answer("snapkv(budget=0.25)", 0.5),
        an_answer(DENSE, 1.0, length=8192),
        an_answer("snapkv(budget=0.25)", 0.25, length=8192),
        an_answer("snapkv(budget=0.5)", 1.0),
    ]
    for name, rows in (("timings", rounds), ("answers", answers)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        methods.keep_record(CONDITIONS, tmp_path / f"{name}.json")
    found, _ = methods.summary(tmp_path, Settings())
    return methods_page.Results(json.loads(json.dumps(found, default=str)))


CONDITIONS = methods.Conditions(
    model="reference",
    parameters=1,
    dtype="float32",
    device="cpu",
    haystack="",
    samples=2,
    seed=0,
    kinds=("word",),
    phrasings=("natural",),
    chat=False,
    truncate=False,
    new_tokens=6,
)


def test_the_page_shows_what_was_measured(results):
    text = methods_page.page(methods_page.own_methods(), results, "A note.")
    (row,) = [line for line in text.splitlines() if line.startswith("| [SnapKV]")]
    assert row.endswith("| – / 37.5 / – | 0.12× | 0.50× | 0.25× |")  # noqa: RUF001
    (goal,) = [line for line in text.splitlines() if line.startswith("| decode against dense")]
    assert goal.endswith("| 1.00× | ≤ 1.20× | met |")  # noqa: RUF001
    assert f"| `{SNAPKV}` | 32k | 1.00 s | 0.50× |" in text  # noqa: RUF001
    assert "A note." in text
    assert "Prompts of 32k tokens once" in text
    assert "over 4k and 8k is the mean of 2 answers" in text
    assert "up to 35 points" in text


def test_first_sentences_do_not_end_in_a_formula():
    class Some(Evict):
        """Scores are `q . k` of all. Then more."""

    assert methods_page.first_sentence(Some) == "Scores are `q . k` of all."


def test_the_picture_has_every_method_that_was_measured(results, tmp_path):
    from methods_plot import draw

    path = tmp_path / "methods.svg"
    draw(methods_page.own_methods(), results, path)
    assert path.read_text().startswith("<?xml")
    before = path.read_bytes()
    draw(methods_page.own_methods(), results, path)
    assert path.read_bytes() == before


def test_a_page_without_results_still_describes_every_method():
    kinds = methods_page.own_methods()
    text = methods_page.page(kinds, methods_page.Results(None))
    for kind in kinds.values():
        assert f"- **{kind.__name__}**: {methods_page.first_sentence(kind)}" in text
    assert "methods.svg" not in text


def test_the_page_in_the_documentation_is_up_to_date():
    wanted = methods_page.page(
        methods_page.own_methods(), methods_page.load_results(), methods_page.load_notes()
    )
    found = methods_page.PAGE.read_text(encoding="utf-8")
    assert found == wanted, "run: python benchmarks/methods_page.py"
    for kind in methods_page.own_methods().values():
        for parameter in asdict(kind()):
            assert f"{parameter}=" in found
