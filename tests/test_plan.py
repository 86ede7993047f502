"""Plans are written one way, mean one thing, and are refused when they are made."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamis.errors import PlanError
from tamis.methods import base
from tamis.methods.budget.headadaptive import HeadAdaptive
from tamis.methods.codec.kivi import KIVI
from tamis.methods.evict.h2o import H2O
from tamis.methods.evict.snapkv import SnapKV
from tamis.methods.merge.d2o import D2O
from tamis.methods.prefill.minference import MInference
from tamis.methods.registry import methods
from tamis.methods.select.quest import Quest
from tamis.methods.views import LayerView, ModelShape, Needs, Pass, PassResult
from tamis.plan import _RULES, Plan, conflict

METHODS = methods()
EVERY = pytest.mark.parametrize("name", METHODS)


def parameter(field: Any) -> st.SearchStrategy[Any]:
    """Values that a parameter's own declaration allows."""
    meta, default = field.metadata, field.default
    if meta["choices"] is not None:
        return st.sampled_from(meta["choices"])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, str):
        return st.text(max_size=12)
    low, high, above = meta["minimum"], meta["maximum"], meta["above"]
    shares = st.floats(
        min_value=low if above is None else above,
        max_value=high,
        exclude_min=above is not None,
        allow_nan=False,
        allow_infinity=False,
    )
    counts = st.integers(min_value=int(above) + 1 if above is not None else low, max_value=high)
    if "|" in str(field.type):
        return counts | shares.filter(lambda share: share <= 1)
    return shares if isinstance(default, float) else counts


def drawn(data: st.DataObject, kind: type[base.Method]) -> base.Method:
    """A method with random parameters, of those that its class accepts."""
    values = {field.name: data.draw(parameter(field), field.name) for field in fields(kind)}
    try:
        return kind(**values)
    except PlanError:  # parameters that are right one by one and wrong together
        assume(False)
        raise


def refusal(plan: str) -> str:
    with pytest.raises(PlanError) as refused:
        Plan.parse(plan)
    return str(refused.value)


# What is written


@EVERY
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_every_method_with_any_parameters_is_read_as_it_is_written(
    name: str, data: st.DataObject
) -> None:
    method = drawn(data, METHODS[name])
    plan = Plan((method, SnapKV())) if isinstance(method, base.Budget) else Plan((method,))

    assert Plan.parse(str(plan)) == plan
    assert str(Plan.parse(str(plan))) == str(plan)


@EVERY
def test_a_name_alone_has_every_default(name: str) -> None:
    rest = " + snapkv()" if METHODS[name].stage == "budget" else ""
    plan = Plan.parse(name + rest)

    assert METHODS[name]() in plan.methods
    assert str(plan) == f"{name}(){rest}"


def test_a_string_and_python_say_the_same() -> None:
    text = "minference() + snapkv(budget=0.1, window=16) + kivi(bits=4) + quest(pages=8)"
    written = Plan.parse(text)

    assert written == MInference() + SnapKV(budget=0.1, window=16) + KIVI(bits=4) + Quest(pages=8)
    assert str(written) == text
    assert HeadAdaptive() + SnapKV() == Plan.parse("snapkv() + headadaptive()")
    assert SnapKV() + "kivi()" == "kivi()" + Plan((SnapKV(),)) == Plan.parse("snapkv + kivi")


def test_the_order_of_terms_does_not_matter() -> None:
    terms = ["quest()", "snapkv()", "minference()", "kivi()"]
    plans = [Plan.parse(" + ".join(order)) for order in itertools.permutations(terms)]

    assert set(plans) == {Plan.parse("minference() + snapkv() + kivi() + quest()")}
    assert {hash(plan) for plan in plans} == {hash(plans[0])}


@pytest.mark.parametrize(
    "terms",
    [
        (HeadAdaptive(), KIVI(), SnapKV()),  # two of them share out the budget of nothing
        (D2O(), KIVI(), Quest(), SnapKV()),  # D2O alone brings an eviction that KIVI bars
    ],
    ids=lambda terms: terms[0].method_name(),
)
def test_terms_are_added_in_any_order(terms: tuple[base.Method, ...]) -> None:
    whole = Plan.parse(" + ".join(map(str, terms)))

    for first, *rest in itertools.permutations(terms):
        plan = Plan((first,))
        for method in rest:
            plan = plan + method
        assert plan.whole() == whole
        assert first + str(rest[0]) == str(first) + rest[0]


def test_a_part_of_a_plan_is_refused_where_it_is_to_be_used() -> None:
    with pytest.raises(PlanError, match="headadaptive shares a budget out"):
        Plan.parse(HeadAdaptive() + KIVI())
    with pytest.raises(PlanError, match="d2o goes on evicting single tokens"):
        Plan.parse(D2O() + KIVI())


def test_names_are_read_in_any_case_and_spacing() -> None:
    assert Plan.parse("  SnapKV( budget = 1_00 )+Kivi ") == SnapKV(budget=100) + KIVI()


@pytest.mark.parametrize("text", ["dense", " Dense ", None])
def test_the_empty_plan_is_dense(text: str | None) -> None:
    plan = Plan.parse(text)

    assert plan == Plan()
    assert plan.dense
    assert str(plan) == "dense"
    assert plan + SnapKV() == Plan((SnapKV(),))


def test_whole_numbers_stand_for_decimals_but_not_the_reverse() -> None:
    assert str(Plan.parse("h2o(heavy=1)")) == "h2o(heavy=1.0)"
    assert "must be of type int" in refusal("snapkv(window=16.0)")


def test_one_token_is_not_the_whole_prompt() -> None:
    one, all_of_it = Plan.parse("h2o(budget=1)"), Plan.parse("h2o(budget=1.0)")

    assert (str(one), str(all_of_it)) == ("h2o(budget=1)", "h2o(budget=1.0)")
    assert one != all_of_it
    assert H2O(budget=1) != H2O(budget=1.0)
    assert {one: "token", all_of_it: "share"} == {Plan((H2O(budget=1),)): "token"} | {
        Plan((H2O(budget=1.0),)): "share"
    }


def test_methods_are_equal_when_class_and_parameters_are() -> None:
    assert H2O(budget=64) == METHODS["h2o"](budget=64)
    assert hash(H2O(budget=64)) == hash(H2O(budget=64))
    assert H2O(budget=64) != H2O(budget=65)
    assert H2O(budget=64) != SnapKV(budget=64)
    assert H2O() != "h2o()"


# What a plan says of itself


def test_a_plan_knows_what_it_does_to_the_cache() -> None:
    assert Plan.parse("snapkv()").drops
    assert Plan.parse("snapkv()").query_dependent
    assert not Plan.parse("kivi()").drops
    assert Plan.parse("kivi()").compresses
    assert not Plan.parse("quest() + minference()").compresses
    assert not Plan.parse("quest() + minference()").query_dependent


def test_it_needs_what_its_methods_need() -> None:
    assert Plan.parse("h2o() + zigzagkv(window=8)").needs == Needs(queries=8, attention=True)
    assert Plan.parse("d2o()").needs == Needs(attention=True)
    assert Plan().needs == Needs()


def test_a_merging_method_brings_its_own_eviction_unless_another_is_named() -> None:
    assert Plan((D2O(budget=0.3),)).evict == D2O(budget=0.3).eviction()
    assert (D2O() + H2O(budget=0.3)).evict == H2O(budget=0.3)
    assert (D2O() + SnapKV()).needs == Needs(queries=32)


# What is refused


def test_unknown_names_are_answered_with_the_nearest() -> None:
    assert refusal("snapvk()") == "unknown method 'snapvk'; did you mean 'snapkv'? " + (
        "`tamis methods` lists all"
    )
    assert refusal("xyz()") == "unknown method 'xyz'; `tamis methods` lists all"
    assert refusal("snapkv(budgt=3)").startswith(
        "snapkv has no parameter 'budgt'; did you mean 'budget'? it has: budget, window"
    )
    assert "snapkv has no parameter 'zz'; it has: budget" in refusal("snapkv(zz=3)")


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("snapkv(window='a')", "snapkv(window='a'): window must be of type int"),
        ("snapkv(budget='a')", "budget must be of type int or float"),
        ("snapkv(window=True)", "window must be of type int"),
        ("streamingllm(in_cache=1)", "in_cache must be of type bool"),
        ("snapkv(budget=0)", "snapkv(budget=0): budget must be more than 0"),
        ("snapkv(budget=1.5)", "snapkv(budget=1.5): budget must be at most 1.0"),
        ("quest(pages=2.0)", "quest(pages=2.0): pages must be at most 1.0"),
        ("sparq(r=1.01)", "r must be at most 1.0"),
        ("tokenselect(k=8.0)", "k must be at most 1.0"),
        ("razorattention(ratio=1e999)", "ratio must be a finite number"),
        (f"h2o(heavy=1{'0' * 400})", "heavy must be a finite number"),
        ("h2o(heavy=-0.1)", "heavy must be at least 0"),
        ("kivi(bits=5)", "kivi(bits=5): bits must be one of 1, 2, 3, 4, 8"),
        ("snapkv(1024)", "name the parameters of snapkv (budget, window, kernel, pooling)"),
        ("snapkv(budget=1, budget=2)", "gives budget twice"),
        ("snapkv(**{'budget': 1})", "snapkv has no parameter None"),
        ("h2o() + snapkv()", "h2o and snapkv cannot be composed: both decide the stage 'evict'"),
        ("kivi + kivi", "both decide the stage 'codec'"),
        ("zigzagkv()", "zigzagkv shares a budget out among layers or heads, so the plan needs a"),
        ("dense + snapkv()", "'dense' is a whole plan and composes with nothing"),
        ("snapkv() + dense", "'dense' is a whole plan and composes with nothing"),
        ("dense()", "'dense' is a whole plan"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(plan: str, reason: str) -> None:
    assert reason in refusal(plan)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "snapkv(",
        "snapkv() kivi()",
        "snapkv() - kivi()",
        "snapkv() + 1",
        "__import__('os').system('true')",
        "__import__('os')",
        "snapkv.__class__()",
        "(lambda: snapkv)()",
        "snapkv()()",
        "snapkv(budget=__import__('os').getpid())",
        "snapkv(budget=open)",
        "snapkv(budget=[1 for _ in 'ab'])",
        "snapkv(budget={[]: 1})",
        "snapkv(window=1 if True else 2)",
        "snapkv(pooling=f'{1}')",
        "snapkv(budget=(x := 1))",
        "snap\0kv()",
        "-" * 100_000 + "1",
        "(" * 1000,
        " + ".join(["snapkv()"] * 20_000),
    ],
    ids=lambda text: text[:24],
)
def test_nothing_but_a_plan_is_a_plan(text: str) -> None:
    refusal(text)


@pytest.mark.parametrize("thing", [1, ["snapkv()"], b"snapkv()"])
def test_other_types_are_refused(thing: Any) -> None:
    assert "a plan is a string such as 'dense'" in refusal(thing)


# What cannot be composed


@dataclass(frozen=True)
class Reviving(base.Tokens):
    """Has programs for generated tokens."""

    steps: ClassVar[bool] = True

    def program(self, prompt_tokens: int, shape: ModelShape) -> Generator[Pass, PassResult, None]:
        yield from ()


@dataclass(frozen=True)
class EveryToken(base.Evict):
    """Evicts with every generated token."""

    interval: ClassVar[int] = 1
    budget: int | float = base.budget_param(0.5)

    def scores(self, view: LayerView) -> Tensor:
        return view.positions.float()


@dataclass(frozen=True)
class Pruning(base.Tokens):
    """Brings an eviction that acts while tokens are generated."""

    def eviction(self) -> EveryToken:
        return EveryToken()

    def program(self, prompt_tokens: int, shape: ModelShape) -> Generator[Pass, PassResult, None]:
        yield from ()


CANDIDATES = [
    *(kind() for kind in METHODS.values()),
    *(Reviving(), Pruning(), D2O(budget=0.3)),
]


def words(reason: str) -> str:
    """What a rule's reason says whatever the methods are called."""
    return max(reason.replace("{a}", "{b}").split("{b}"), key=len)


@pytest.mark.parametrize("rule", _RULES, ids=lambda rule: f"{rule.stage}-{rule.applies.__name__}")
def test_every_rule_refuses_a_pair_of_each_of_its_stages_and_names_both(rule: Any) -> None:
    refused = set()
    for first, second in itertools.permutations(CANDIDATES, 2):
        reason = conflict(first, second)
        if first.stage == rule.stage and reason is not None and words(rule.reason) in reason:
            refused.add(second.stage)
            with pytest.raises(PlanError) as error:
                Plan((first, second)).whole()
            assert first.method_name() in str(error.value)
            assert second.method_name() in str(error.value)
            assert words(rule.reason) in str(error.value)
    assert refused == set(rule.others)


def test_pairs_that_no_rule_names_compose_in_either_order() -> None:
    for first, second in itertools.combinations(CANDIDATES, 2):
        reason = conflict(first, second)
        assert conflict(second, first) == reason
        alone = any(isinstance(method, base.Budget) for method in (first, second))
        if reason is None and not alone:
            assert first + second == second + first


def test_an_eviction_that_goes_on_is_refused_where_it_acts_and_only_there() -> None:
    assert "d2o goes on evicting" in refusal("d2o() + kivi()")
    assert "d2o judges tokens" in refusal("d2o() + quest()")
    assert "lagkv goes on evicting" in refusal("lagkv() + d2o() + kivi()")
    assert isinstance(Plan.parse("snapkv() + d2o() + kivi() + quest()").evict, SnapKV)
    assert "pruning goes on evicting" in str(conflict(Pruning(), KIVI()))


def test_what_a_merging_method_is_given_is_not_ignored_in_silence() -> None:
    assert refusal("snapkv(budget=0.1) + d2o(budget=0.3)") == (
        "snapkv and d2o cannot be composed: d2o uses budget in the eviction that it brings, and "
        "here snapkv evicts; set the budget of snapkv instead"
    )
    assert "d2o uses budget and heavy in" in refusal("d2o(budget=0.3, heavy=0.5) + h2o()")
    assert "kvmerger uses recent in" in refusal("kvmerger(recent=0.5) + h2o()")
    assert Plan.parse("snapkv(budget=0.1) + d2o(beta=0.5)").evict == SnapKV(budget=0.1)
    assert Plan.parse("h2o() + kvmerger(threshold=0.5)").evict == H2O()


def test_methods_know_their_own_conflicts() -> None:
    assert "its heads vote for tokens by their place" in refusal("tokenselect() + snapkv()")


def test_an_unfit_pair_is_refused_in_python_as_in_a_string() -> None:
    with pytest.raises(PlanError, match="h2o goes on evicting"):
        H2O() + KIVI()
