"""What requests yield does not depend on copies that run beside the model: of swapped sequences,
and of pages that plans keep in host memory.

There is no GPU here: torch's streams of the CPU make every copy at once, and `LateStreams` as late
as may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tamis import LLM, SamplingParams
from tamis.cache import PagedCache
from tamis.cache.transfers import Transfers
from tamis.engine.order import ByPriority
from tamis.engine.sequence import Status
from tamis.model import Model
from tamis.plan import Plan
from tests.cache.streams import LateStreams

GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
CPU = torch.device("cpu")


@pytest.fixture(params=["now", "late"])
def streams(request: pytest.FixtureRequest) -> Any:
    return torch.cpu if request.param == "now" else LateStreams()


def make(llama: Model, **settings: Any) -> LLM:
    return LLM(llama, page_size=8, host_memory="4MiB", **({"kv_memory": "4MiB"} | settings))


@pytest.fixture
def beside(streams: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """`make`, of engines that copy as with a GPU, through little memory."""

    def cache(layout: Any, capacity: int, device: Any, swap: int, host: int) -> PagedCache:
        staged = 2 * layout.block_bytes(capacity)
        return PagedCache(layout, capacity, device, swap, host, Transfers(CPU, staged, streams))

    def make_one(*args: Any, **settings: Any) -> LLM:
        with monkeypatch.context() as patch:
            patch.setattr("tamis.engine.engine.PagedCache", cache)
            return make(*args, **settings)

    return make_one


@pytest.mark.parametrize("plan", ["dense", "snapkv(budget=12, window=4)", "headinfer()"])
def test_swapped_requests_yield_what_they_yield_undisturbed(
    plan: str, llama: Model, prompts: list[list[int]], beside: Callable[..., LLM]
) -> None:
    """One after the other gives way, some of them again before their pages are there."""
    alone = make(llama)
    expected = [alone.generate([prompt], GREEDY, plan)[0].token_ids for prompt in prompts]
    llm = beside(llama, preemption="swap", swap_memory="4MiB")
    engine, outputs, steps = llm.engine, {}, 0
    asked = [engine.add_request(prompt, GREEDY, Plan.parse(plan)) for prompt in prompts]
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
        steps += 1
        running = engine.scheduler.running
        if running and steps % 2:
            engine.scheduler._preempt(running[steps % len(running)])
    assert engine.stats.preemptions > 15
    assert engine.cache.copies.copied_bytes
    assert [outputs[one].token_ids for one in asked] == expected
    assert engine.cache.bytes_in_use == engine.cache.swap_bytes_in_use == 0


def test_requests_that_need_each_others_room_end(
    llama: Model, prompts: list[list[int]], beside: Callable[..., LLM]
) -> None:
    room = make(llama).engine.layout.bytes_for(150)
    expected = [o.token_ids for o in make(llama).generate(prompts, GREEDY)]
    llm = beside(llama, kv_memory=room, preemption="swap", swap_memory=2 * room)
    assert [o.token_ids for o in llm.generate(prompts, GREEDY)] == expected
    assert llm.engine.stats.preemptions > 0


def test_a_resumed_request_joins_the_step_after_the_one_beside_which_its_pages_come(
    llama: Model, prompts: list[list[int]], beside: Callable[..., LLM]
) -> None:
    llm = beside(llama, preemption="swap", swap_memory="4MiB")
    engine = llm.engine
    for prompt in prompts[1:3]:
        engine.add_request(prompt, GREEDY)
    for _ in range(3):
        engine.step()
    first, second = engine.scheduler.running
    engine.scheduler._preempt(second)
    before = second.n_output
    engine.step()
    assert second.status is Status.RUNNING
    assert second.n_output == before
    engine.step()
    assert second.n_output == before + 1
    engine.scheduler._preempt(second)
    engine.abort(first.request.id)
    engine.step()  # there is nothing else to do meanwhile
    assert second.n_output == before + 2


def test_a_resumed_request_goes_on_at_once_where_all_others_give_way(
    llama: Model,
    prompts: list[list[int]],
    beside: Callable[..., LLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third one takes the place of the only one that runs, and then cannot begin."""
    expected = make(llama).generate([prompts[1]], GREEDY)[0].token_ids
    llm = beside(llama, preemption="swap", swap_memory="4MiB", max_running=2, order=ByPriority())
    engine = llm.engine
    engine.add_request(prompts[1], GREEDY, priority=0, request_id="resumed")
    engine.add_request(prompts[2], GREEDY, priority=5)
    for _ in range(3):
        engine.step()
    (resumed, _) = engine.scheduler.running
    engine.scheduler._preempt(resumed)
    engine.add_request(prompts[5], GREEDY, priority=1)
    before = resumed.n_output
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "_assembled", lambda sequence: False)
        engine.step()
    assert engine.scheduler.running == [resumed]
    assert resumed.n_output == before + 1
    outputs: dict[str, Any] = {}
    while not engine.idle:
        outputs |= {i.request_id: i.output for i in engine.step() if i.output}
    assert outputs["resumed"].token_ids == expected


@pytest.mark.parametrize("plan", ["headinfer()", "headinfer(resident=0.5)"])
def test_pages_in_host_memory_are_brought_ahead(
    plan: str, llama: Model, prompts: list[list[int]], beside: Callable[..., LLM]
) -> None:
    """Prompts in chunks and decodes, of several lengths in a batch with exact requests."""
    expected = [o.token_ids for o in make(llama).generate(prompts, GREEDY)]
    plans = [plan, "dense"] * (len(prompts) // 2)
    llm = beside(llama, max_batch_tokens=32)
    transfers = llm.engine.cache.transfers
    assert transfers is not None
    assert [o.token_ids for o in llm.generate(prompts, GREEDY, plans)] == expected
    assert all(buffer.numel() for buffer in transfers._ahead)


def test_each_layers_pages_are_on_their_way_while_those_before_are_read(
    llama: Model, prompts: list[list[int]], beside: Callable[..., LLM], streams: Any
) -> None:
    if not isinstance(streams, LateStreams):
        pytest.skip("torch's streams of the CPU do not tell")
    llm = beside(llama)
    transfers, calls = llm.engine.cache.transfers, []
    assert transfers is not None
    ahead = transfers.ahead

    def noted(*args: Any) -> Callable[[], torch.Tensor]:
        calls.append("begun")
        arrive = ahead(*args)

        def wait() -> torch.Tensor:
            calls.append("read")
            return arrive()

        return wait

    transfers.ahead = noted  # type: ignore[method-assign]
    llm.engine.add_request(prompts[4], GREEDY, Plan.parse("headinfer()"))
    llm.engine.step()
    assert not calls  # nothing lies in host memory yet
    llm.engine.step()
    n = len(llm.model.layers)
    assert calls == ["begun", *["begun", "read"] * (n - 1), "read"]
