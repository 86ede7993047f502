"""What a request with a plan yields depends on no other request: batches of mixed plans, branches,
preemption, cancellation, random traffic."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tamis import LLM, SamplingParams
from tamis.engine.outputs import RequestOutput
from tamis.methods.registry import methods
from tamis.plan import Plan
from tests.methods.engine.plans import CASES, LONG

Make = Callable[..., LLM]

NEW_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
PLANS = {"dense": "dense"} | {name: case.plan for name, case in CASES.items()}
PLANS |= {f"long-{i}": plan for i, plan in enumerate(LONG)}

WHOLE = 8192
"""Tokens of a step with which every prompt is one chunk, whatever runs beside it."""


def by_chunk(name: str) -> bool:
    """Whether what is computed or kept depends on the chunks in which the prompt comes."""
    if name in CASES:
        method = methods()[name]
        return method.stage == "prefill" or getattr(method, "per_chunk", False)
    return "minference" in PLANS[name]


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    assert all(output.error is None for output in outputs), [o.error for o in outputs]
    return [[c.token_ids for c in output.completions] for output in outputs]


def sampled(every: int, *firsts: object) -> list[object]:
    """The names of all plans, all but a sample of them slow; with `firsts`, each of these with each
    name, and with samples of their own."""
    return [
        pytest.param(
            *([first, name] if firsts else [name]),
            marks=[] if (i + 2 * shift) % every == 0 else pytest.mark.slow,
        )
        for shift, first in enumerate(firsts or [None])
        for i, name in enumerate(PLANS)
    ]


def nothing_held(llm: LLM) -> bool:
    """Whether no page, in whichever memory, is in use."""
    cache = llm.engine.cache
    return cache.bytes_in_use == cache.host_bytes_in_use == cache.swap_bytes_in_use == 0


@pytest.fixture(scope="module")
def alone(llms: Make, prompts: list[list[int]]) -> Callable[..., list[list[int]]]:
    """`alone(plan, prompt, params)`: what each branch yields when nothing else runs."""
    known: dict[tuple[str, int, SamplingParams], list[list[int]]] = {}

    def run(plan: str, prompt: int, params: SamplingParams = GREEDY) -> list[list[int]]:
        key = (plan, prompt, params)
        if key not in known:
            llm = llms("llama", max_batch_tokens=WHOLE)
            known[key] = tokens(llm.generate([prompts[prompt]], params, plan))[0]
        return known[key]

    return run


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk", [WHOLE, 64], ids=["whole", "chunked"])
def test_a_batch_of_mixed_plans_yields_what_each_yields_alone(
    make: Make,
    prompts: list[list[int]],
    alone: Callable[..., list[list[int]]],
    chunk: int,
    times: int,
) -> None:
    names = [name for name in PLANS if chunk == WHOLE or not by_chunk(name)]
    asked = [(PLANS[name], i % len(prompts)) for i, name in enumerate(names * times)]
    llm = make(max_batch_tokens=chunk)
    outputs = llm.generate([prompts[i] for _, i in asked], GREEDY, [plan for plan, _ in asked])
    for (plan, i), output in zip(asked, tokens(outputs), strict=True):
        assert output == alone(plan, i), plan
    assert nothing_held(llm)


@pytest.mark.parametrize("name", sampled(4))
def test_greedy_branches_yield_what_one_sequence_yields(
    name: str, llms: Make, prompts: list[list[int]], alone: Callable[..., list[list[int]]]
) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, n=2)
    llm = llms("llama", max_batch_tokens=WHOLE)
    [output] = llm.generate([prompts[0]], params, PLANS[name])
    assert tokens([output])[0] == alone(PLANS[name], 0) * 2
    assert nothing_held(llm)


@pytest.mark.parametrize("name", sampled(6))
def test_sampled_branches_differ_and_the_first_is_what_one_sequence_yields(
    name: str, llms: Make, prompts: list[list[int]]
) -> None:
    """Branches that went apart each keep, evict and encode tokens of their own.

    torch's products of one row and of three differ in their last bits, and a code of two bits that
    falls on the other side turns such a difference into a large one.
    """
    llm = llms("llama", max_batch_tokens=WHOLE)
    three, one = (
        SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=1.0, seed=5, n=n)
        for n in (3, 1)
    )
    [branches] = tokens(llm.generate([prompts[1]], three, PLANS[name]))
    [single] = tokens(llm.generate([prompts[1]], one, PLANS[name]))
    if Plan.parse(PLANS[name]).codec is None:
        assert branches[0] == single[0]
    assert len({tuple(branch) for branch in branches}) == 3
    assert nothing_held(llm)


@pytest.mark.parametrize("plan", ["h2o(budget=0.5)", "d2o(budget=0.5)"])
def test_branches_that_count_attention_find_pages_for_copies_of_what_they_share(
    plan: str, make: Make, prompts: list[list[int]]
) -> None:
    """Counting writes to every page, so that no branch can share one; there is room for two."""
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, n=5)
    single = make(max_batch_tokens=WHOLE)
    [one] = single.generate([prompts[0]], GREEDY, plan)
    llm = make(max_batch_tokens=WHOLE, kv_memory=int(1.5 * single.engine.cache.bytes_peak))
    [output] = llm.generate([prompts[0]], params, plan)
    assert tokens([output])[0] == tokens([one])[0] * 5
    assert output.metrics.preemptions > 0
    assert nothing_held(llm)


@pytest.mark.parametrize(("preemption", "name"), sampled(16, "recompute", "swap"))
def test_preemption_changes_no_token(
    preemption: str,
    name: str,
    make: Make,
    prompts: list[list[int]],
    alone: Callable[..., list[list[int]]],
) -> None:
    """Four requests in a memory of little more than the largest needs: as its prompt is computed
    whole, the others have to wait or to give way while they generate."""
    plan = PLANS[name]
    single = make(max_batch_tokens=WHOLE)
    single.generate([prompts[0]], GREEDY, plan)
    least = single.engine.cache.required_bytes(len(prompts[0]) + NEW_TOKENS)
    room = max(least, int(1.35 * single.engine.cache.bytes_peak))
    llm = make(max_batch_tokens=WHOLE, kv_memory=room, preemption=preemption, host_memory="32MiB")
    outputs = llm.generate([*prompts, *prompts[::-1]], GREEDY, plan)
    expected = [alone(plan, i) for i in (0, 1, 2, 3, 3, 2, 1, 0)]
    assert tokens(outputs) == expected
    assert nothing_held(llm)


@pytest.mark.parametrize("part", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_happens_and_changes_no_token_of_mixed_plans(
    preemption: str,
    part: int,
    make: Make,
    prompts: list[list[int]],
    alone: Callable[..., list[list[int]]],
) -> None:
    """Long outputs of short prompts grow beyond the memory that they were admitted into."""
    params = SamplingParams(max_tokens=90, ignore_eos=True)
    names = [name for name in PLANS if not by_chunk(name)][::part]
    room = make().engine.cache.required_bytes(1100 // part)
    llm = make(max_batch_tokens=WHOLE, kv_memory=room, preemption=preemption, host_memory="32MiB")
    plans = [PLANS[name] for name in names]
    outputs = llm.generate([prompts[3]] * len(plans), params, plans)
    assert llm.engine.stats.preemptions > 5 // part
    for plan, output in zip(plans, tokens(outputs), strict=True):
        assert output == alone(plan, 3, params), plan
    assert nothing_held(llm)


@pytest.mark.parametrize(("steps", "name"), sampled(3, 1, 3, 20))
def test_cancelling_frees_everything_at_once(
    steps: int, name: str, llms: Make, prompts: list[list[int]]
) -> None:
    """In the middle of the prompt, at its end, while branches generate."""
    llm = llms("llama", max_batch_tokens=96)
    engine = llm.engine
    params = SamplingParams(max_tokens=60, ignore_eos=True, n=2, temperature=1.0, seed=0)
    request = engine.add_request(prompts[0], params, Plan.parse(PLANS[name]))
    for _ in range(steps):
        engine.step()
    assert not engine.idle
    engine.abort(request)
    assert engine.idle
    assert nothing_held(llm)


@pytest.mark.parametrize(
    ("name", "preemption", "seed"),
    [
        ("llama", "recompute", 0),
        ("gemma3", "swap", 0),
        *(
            pytest.param(name, preemption, seed, marks=pytest.mark.slow)
            for name in ("llama", "gemma3")
            for preemption in ("recompute", "swap")
            for seed in (1, 2)
        ),
    ],
)
def test_random_traffic_of_random_plans(
    name: str, preemption: str, seed: int, make: Make, llms: Make
) -> None:
    """Requests that come, fork, are cancelled and give way yield what they yield alone, within the
    memory there is."""
    rng = random.Random(seed)
    plans = [PLANS[one] for one in PLANS if not by_chunk(one)]
    room = llms(name).engine.cache.required_bytes(500)
    llm = make(
        name,
        kv_memory=room,
        max_batch_tokens=96,
        max_running=8,
        preemption=preemption,
        swap_memory=room // 3,
        host_memory="32MiB",
    )
    engine = llm.engine
    asked: dict[str, tuple[list[int], SamplingParams, str]] = {}
    outputs: dict[str, RequestOutput] = {}
    aborted: set[str] = set()
    for step in range(160):
        if step < 80 and rng.random() < 0.3:
            prompt = [rng.randrange(256) for _ in range(rng.choice([5, 60, 150]))]
            params = SamplingParams(
                max_tokens=rng.choice([1, 7, 40]),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(1000),
                n=rng.choice([1, 1, 2]),
                ignore_eos=True,
            )
            plan = rng.choice(plans)
            asked[engine.add_request(prompt, params, Plan.parse(plan))] = (prompt, params, plan)
        if rng.random() < 0.03 and (running := sorted(asked.keys() - outputs.keys())):
            aborted.add(victim := rng.choice(running))
            [*_, last] = engine.abort(victim)
            assert last.output is not None
            outputs[victim] = last.output
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
        assert engine.cache.bytes_in_use <= room
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
    assert outputs.keys() == asked.keys()
    assert nothing_held(llm)
    for request_id, (prompt, params, plan) in asked.items():
        [alone] = tokens(llms(name, max_batch_tokens=WHOLE).generate([prompt], params, plan))
        mine = [completion.token_ids for completion in outputs[request_id].completions]
        if request_id not in aborted:
            assert (mine, outputs[request_id].error) == (alone, None), plan
        for branch, reference in zip(mine, alone, strict=False):
            assert branch == reference[: len(branch)], plan
