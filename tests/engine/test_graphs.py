"""A decode step that was recorded, run again for other sequences, says what it says run anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tamis import SamplingParams
from tamis.cache import BatchView
from tamis.engine import graphs
from tamis.engine.engine import Engine
from tamis.engine.graphs import Capture, DecodeGraphs, capture_for, run_again
from tamis.model import Model
from tamis.plan import Plan
from tests.tiny_models import CONFIGS

Asked = list[tuple[list[int], SamplingParams]]


def into_one_tensor(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As a CUDA graph does it: every run leaves its result where the one before left its own."""
    result = run().clone()
    return lambda: result.copy_(run())


def make(model: Model, capture: Capture | None = into_one_tensor, **settings: Any) -> Engine:
    defaults = {"kv_bytes": 16 << 20, "page_size": 4, "max_batch_tokens": 64}
    return Engine(model, capture=capture, **(defaults | settings))


def recorder(engine: Engine) -> DecodeGraphs:
    assert engine.graphs is not None
    return engine.graphs


def generate(engine: Engine, asked: Asked, plan: str = "dense", after: int = 0) -> list[list[int]]:
    """The tokens of all sequences; a request arrives every `after` steps, 0 for all at once."""
    tokens: dict[tuple[str, int], list[int]] = {}
    waiting, steps = list(enumerate(asked)), 0
    while waiting or not engine.idle:
        while waiting and (not after or steps % after == 0):
            number, (prompt, params) = waiting.pop(0)
            engine.add_request(prompt, params, Plan.parse(plan), request_id=f"{number:03}")
            if after:
                break
        for increment in engine.step():
            assert increment.error is None
            name = increment.request_id, increment.index
            tokens.setdefault(name, []).extend(increment.token_ids)
        steps += 1
    return [tokens[name] for name in sorted(tokens)]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)


@pytest.fixture
def asked(prompts: list[list[int]]) -> Asked:
    """Requests that end one after another; the longest crosses from 16 pages to 32."""
    return [(prompt, greedy(n)) for prompt, n in zip(prompts, (70, 20, 30, 40, 5, 12), strict=True)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss", "mixtral", "stablelm"])
def test_batches_that_grow_and_shrink_yield_the_same(
    load: Callable[[str], Model], asked: Asked, name: str
) -> None:
    """Of models with windows, soft-caps, sinks and partial RoPE too."""
    model = load(name)
    plain, engine = make(model, None), make(model)
    for after in (0, 3):
        assert generate(engine, asked, after=after) == generate(plain, asked, after=after)
    assert recorder(engine).run > 80
    assert engine.cache.bytes_in_use == 0


def test_each_size_is_recorded_once(llama: Model, asked: Asked) -> None:
    sizes = []

    def noted(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        sizes.append(tuple(recorder(engine)._steps)[-1][:2])
        return run

    engine = make(llama, noted)
    for _ in range(2):
        generate(engine, asked)
    assert sorted(sizes) == [(1, 16), (1, 32), (2, 16), (4, 16), (4, 32), (8, 16), (8, 32)]
    assert recorder(engine).recorded == len(sizes)


def test_the_least_recently_used_is_forgotten(llama: Model) -> None:
    engine = make(llama)
    engine.graphs = DecodeGraphs(llama, engine.cache, into_one_tensor, most=2)
    for n, recorded in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4)):
        generate(engine, [([7], greedy(4))] * n)
        assert engine.graphs.recorded == recorded


def test_page_tables_beyond_a_size_are_not_kept(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_ENTRIES", 2 * 16 * 6)  # two rows of 3 layers with 2 KV heads
    for n, run in ((2, 4), (3, 0)):
        engine = make(llama)
        generate(engine, [([7], greedy(4))] * n)
        assert recorder(engine).run == run


def test_a_step_that_is_recorded_says_nothing_of_what_steps_cost(llama: Model) -> None:
    engine = make(llama)
    engine.add_request([1, 2, 3], greedy(9))
    engine.step()
    for recorded, told in ((1, False), (1, True)):
        engine.step()
        assert recorder(engine).recorded == recorded
        assert (engine.scheduler.costs.decode_s is not None) == told


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_changes_no_token(llama: Model, asked: Asked, preemption: str) -> None:
    room = make(llama).cache.required_bytes(130, chunk=16)
    engine = make(
        llama, kv_bytes=room, max_batch_tokens=16, preemption=preemption, swap_bytes=room // 2
    )
    assert generate(engine, asked) == generate(make(llama, None), asked)
    assert engine.stats.preemptions > 0
    assert recorder(engine).run > 50


def test_branches_that_share_pages_go_their_own_ways(llama: Model) -> None:
    asked = [([1, 2, 3, 4, 5], greedy(20, temperature=1.0, seed=3, n=3, logprobs=2))]
    engine = make(llama)
    assert generate(engine, asked) == generate(make(llama, None), asked)
    assert recorder(engine).run == 19


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_empty_rows_write_nowhere(
    llama: Model, monkeypatch: pytest.MonkeyPatch, backend: str, extension: Any
) -> None:
    """A step changes the slots of its new tokens in the arena, and not a byte beside them."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TAMIS_BACKEND", backend)
    looked = []

    def compared(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            data = engine.cache.arena.data
            before, slots = data.clone(), torch.zeros_like(data)
            result = run()
            for sequence in engine.scheduler.running:
                mark_next(sequence.cache, slots)
            changed = before != data
            assert not (changed & (slots == 0)).any()
            looked.append(int(changed.sum()))
            return result

        return replay

    engine = make(llama, compared, kv_bytes=1 << 20)
    asked = [([5] * n, greedy(6)) for n in (3, 4, 9)]
    tokens = generate(engine, asked)
    assert [len(one) for one in tokens] == [6, 6, 6]
    assert len(looked) == 5
    assert min(looked) > 3 * 2 * 3 * 16  # nearly all bytes of 3 sequences' keys and values
    monkeypatch.setenv("TAMIS_BACKEND", "reference")
    assert tokens == generate(make(llama, None), asked)


def mark_next(cache: Any, slots: Tensor) -> None:
    """Set the bytes of the next token of every head to 1."""
    layout = cache.layout
    for layer in range(len(layout.layers)):
        format = layout.formats[layout.layer_formats[layer]]
        for row in range(*layout.rows(layer).indices(layout.n_rows)):
            page, slot = divmod(int(cache.lengths[row]), format.page_size)
            for name in ("k", "v", "position"):
                field = format.view(slots, name)[cache.tables[row, page], slot]
                field.view(torch.uint8).fill_(1)


@pytest.mark.parametrize(
    ("plan", "steps"),
    [
        ("dense", 9),
        ("streamingllm(sinks=2, budget=24)", 9),
        ("snapkv(budget=20, window=4)", 9),
        ("kivi(bits=4, group_size=8, residual=8)", 9),
        ("snapkv(budget=20, window=4) + kivi(bits=2, group_size=8, residual=8)", 9),
        ("minicache()", 0),  # shared pages beside the live ones
        ("quest(pages=2)", 0),  # reads some pages only
        ("h2o(budget=24)", 0),  # counts the attention of every step
    ],
)
def test_plans_whose_steps_read_all_live_pages_and_nothing_else_qualify(
    llama: Model, prompts: list[list[int]], plan: str, steps: int
) -> None:
    asked = [(prompts[2], greedy(10)), (prompts[4], greedy(10))]
    engine, plain = (make(llama, capture, page_size=8) for capture in (run_again, None))
    assert generate(engine, asked, plan) == generate(plain, asked, plan)
    assert recorder(engine).run == steps


def test_encoded_pages_of_one_kind_qualify_beside_exact_ones(
    llama: Model, prompts: list[list[int]]
) -> None:
    def run(capture: Capture | None, *plans: str) -> tuple[list[int], Engine]:
        engine, tokens = make(llama, capture, page_size=8, max_batch_tokens=256), []
        for prompt, plan in zip([prompts[2], prompts[4], prompts[5]], plans, strict=True):
            engine.add_request(prompt, greedy(10), Plan.parse(plan))
        while not engine.idle:
            tokens += [token for i in engine.step() for token in i.token_ids]
        return tokens, engine

    kivi, other = "kivi(bits=4, group_size=8, residual=8)", "kivi(bits=2, group_size=8, residual=8)"
    for plans, steps in (((kivi, "dense", kivi), 9), ((kivi, "dense", other), 0)):
        tokens, engine = run(into_one_tensor, *plans)
        assert tokens == run(None, *plans)[0]
        assert recorder(engine).run == steps


def test_drafts_do_not_qualify(llama: Model) -> None:
    asked = [([1, 2, 3] * 8, greedy(30))]
    engine, plain = make(llama), make(llama, None)
    assert generate(engine, asked, "tokenrecycling()") == generate(plain, asked)
    stats, run = engine.stats, recorder(engine).run
    assert stats.drafted > 0
    assert 0 < run < stats.steps - 1  # those before there is anything to propose do


def test_one_sequence_that_does_not_qualify_keeps_the_step_from_it(llama: Model) -> None:
    engine = make(llama)
    engine.add_request([1, 2, 3], greedy(20), request_id="plain")
    engine.step()
    engine.step()
    assert recorder(engine).run == 1
    engine.add_request([1, 2, 3], greedy(5), Plan.parse("h2o(budget=24)"), request_id="observed")
    while not any(i.request_id == "observed" and i.finish_reason for i in engine.step()):
        pass
    assert recorder(engine).run == 1
    engine.step()
    assert recorder(engine).run == 2


def test_prompts_that_are_scored_token_by_token_do_not_qualify(llama: Model) -> None:
    asked = [([1, 2, 3, 4, 5, 6], greedy(4, prompt_logprobs=1))]
    engine = make(llama, max_batch_tokens=1)
    assert generate(engine, asked) == generate(make(llama, None), asked)
    assert recorder(engine).run == 4  # the last token of the prompt has no successor to score


def test_rope_that_depends_on_the_length_does_not_qualify(
    load: Callable[[str], Model], asked: Asked
) -> None:
    model = load("llama-dynamic")
    engine = make(model)
    assert generate(engine, asked[:2]) == generate(make(model, None), asked[:2])
    assert recorder(engine).run == 0


def test_a_prefix_worth_reading_once_is_read_once(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [([9] * 24, greedy(6, n=3, temperature=1.0, seed=1))]
    engine = make(llama)
    generate(engine, asked)
    assert recorder(engine).run == 5
    monkeypatch.setattr(graphs, "WORTH", 2 * 24)
    generate(engine, asked)
    assert recorder(engine).run == 5


def test_what_a_step_returned_stays(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(llama)
    logits, returned = recorder(engine).logits, []

    def noted(*args: Any) -> Tensor | None:
        result = logits(*args)
        if result is not None:
            returned.append((result, result.clone()))
        return result

    monkeypatch.setattr(recorder(engine), "logits", noted)
    generate(engine, [([1, 2, 3], greedy(6))])
    assert len(returned) == 5
    assert all(torch.equal(result, copy) for result, copy in returned)


def test_what_cannot_be_recorded_runs_as_it_would(
    llama: Model, asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def failing(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tried.append(run())  # the pages have been written when it fails
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("capture invalidated")

    engine = make(llama, failing)
    with caplog.at_level(logging.WARNING):
        assert generate(engine, asked) == generate(make(llama, None), asked)
    assert len(tried) == 1
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.endswith("RuntimeError: operation not permitted when stream is capturing")


WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::equal",
}
"""Operations that wait for the device, or send to it what is then of that moment."""


@contextmanager
def operations() -> Iterator[set[str]]:
    """The names of torch's operations that run within."""
    seen: set[str] = set()

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            masks = [at for at in args[1:2] if isinstance(at, list | tuple)]
            masked = any(
                isinstance(x, Tensor) and x.dtype == torch.bool for at in masks for x in at
            )
            seen.add("aten::nonzero" if masked else func.name())
            return func(*args, **(kwargs or {}))

    with Noted():
        yield seen


PLAIN = "dense"
ENCODED = "kivi(bits=4, group_size=4, residual=4)"


@pytest.mark.parametrize(
    ("name", "plan"),
    [(name, PLAIN) for name in sorted(CONFIGS.keys() - {"llama-dynamic", "phi3-longrope"})]
    + [("llama", ENCODED)],
)
def test_the_host_is_asked_for_nothing_within(
    load: Callable[[str], Model], extension: Any, name: str, plan: str
) -> None:
    """Which a CUDA graph could not record."""
    within: set[str] = set()

    def watched(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with operations() as seen:
            run()
        within.update(seen)
        return run

    generate(make(load(name), watched), [(list(range(20)), greedy(3))], plan)
    assert "aten::embedding" in within
    assert not within & WAITS


def test_the_ordinary_step_is_not_what_is_recorded(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(llama)
    engine.add_request([1, 2, 3], greedy(9))
    engine.step()
    monkeypatch.setattr(BatchView, "__init__", None)
    assert len(engine.step()[0].token_ids) == 1


def test_steps_are_recorded_where_there_are_graphs() -> None:
    cpu = torch.device("cpu")
    assert capture_for(cpu, None) is None
    assert capture_for(cpu, False) is None
    assert capture_for(cpu, True) is run_again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_it_says_run_anew(tiny_dir: Any, asked: Asked) -> None:
    from tamis.model import load_model

    model = load_model(tiny_dir("llama"), dtype="float32", device="cuda")
    engine = make(model, capture_for(model.device, None))
    assert generate(engine, asked) == generate(make(model, None), asked)
    assert recorder(engine).run > 40
