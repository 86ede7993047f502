"""AsyncLLM: many callers, streams, cancelling, contexts, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tamis import LLM, AsyncLLM, SamplingParams
from tamis.errors import EngineError, KVMemoryError, PlanError, RequestError

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_dir: Callable[[str], Path]) -> LLM:
    return LLM(tiny_dir("llama"), dtype="float32", kv_memory="16MiB")


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


def test_concurrent_callers_get_what_they_would_get_alone(
    llm: LLM, tiny_dir: Callable[[str], Path]
) -> None:
    prompts = ["one", "two two", "three", "f" * 70]
    alone = [o.text for o in llm.generate(prompts, PARAMS)]

    async def main() -> list[str]:
        async with AsyncLLM(tiny_dir("llama"), dtype="float32", kv_memory="16MiB") as served:

            async def ask(prompt: str) -> str:
                return "".join([i.text async for i in served.generate(prompt, PARAMS)])

            return await asyncio.gather(*map(ask, prompts))

    assert run(main()) == alone


def test_leaving_the_iterator_or_cancelling_frees_the_pages(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm.model, kv_memory="16MiB") as served:
            endless = SamplingParams(max_tokens=400, ignore_eos=True)
            stream = served.generate("hello", endless)
            await anext(stream)
            await stream.aclose()

            async def read() -> None:
                async for _ in served.generate("hello", endless):
                    pass

            task = asyncio.create_task(read())
            while served.engine.cache.bytes_in_use == 0:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not served.engine.idle:
                await asyncio.sleep(0.001)
            assert served.engine.cache.bytes_in_use == 0
            rest = [i async for i in served.generate("hello", PARAMS)]
            assert len(rest) == 8

    run(main())


def test_abort_ends_the_reader(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm.model, kv_memory="16MiB") as served:
            endless = SamplingParams(max_tokens=400, ignore_eos=True)
            reasons = []
            async for increment in served.generate("hello", endless, request_id="mine"):
                reasons.append(increment.finish_reason)
                if len(reasons) == 3:
                    await served.abort("mine")
            assert reasons[-1] == "abort"
            await served.abort("nobody's")

    run(main())


def test_errors_reach_their_caller_and_nobody_else(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm.model, kv_memory="256KiB") as served:
            first = served.generate("hello", SamplingParams(max_tokens=50), request_id="mine")
            got = [await anext(first)]
            for prompt, name, error in (
                ([], None, RequestError),
                ([1] * 480, None, KVMemoryError),
                ("x", "mine", RequestError),
            ):
                with pytest.raises(error):
                    await anext(served.generate(prompt, PARAMS, request_id=name))
            with pytest.raises(PlanError):
                await anext(served.generate("x", PARAMS, plan="snapkw"))
            got += [i async for i in first]
            assert got[-1].finish_reason in ("length", "stop")

    run(main())


def test_closing_aborts_what_runs_and_refuses_what_comes(llm: LLM) -> None:
    async def main() -> None:
        served = AsyncLLM(llm.model, kv_memory="16MiB")
        stream = served.generate("hello", SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        await asyncio.to_thread(served.close)
        rest = [i async for i in stream]
        assert rest[-1].finish_reason == "abort"
        assert served.engine.cache.bytes_in_use == 0
        with pytest.raises(EngineError, match="closed"):
            await anext(served.generate("hello", PARAMS))
        served.close()

    run(main())


def test_prompts_are_submitted_all_or_none(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm.model, kv_memory="16MiB") as served:
            with pytest.raises(RequestError, match="empty"):
                await served.submit(["good", []], PARAMS)
            assert served.engine.idle
            stream = await served.submit(["one", "two"], PARAMS, request_ids=["a", "b"])
            texts = {"a": "", "b": ""}
            while batch := await stream.batch():
                for increment in batch:
                    texts[increment.request_id] += increment.text
            assert list(texts.values()) == [o.text for o in llm.generate(["one", "two"], PARAMS)]

    run(main())


def test_the_request_of_a_reader_who_does_not_read_is_ended(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm.model, kv_memory="16MiB", max_pending=10) as served:
            endless = SamplingParams(max_tokens=400, ignore_eos=True)
            stream = await served.submit(["hello"], endless)
            while not served.engine.idle:
                await asyncio.sleep(0.001)
            waiting = await stream.batch()
            assert len(waiting) <= 12
            assert waiting[-1].finish_reason == "error"
            assert "not read as fast" in (waiting[-1].error or "")
            assert len([i async for i in served.generate("hello", PARAMS)]) == 8

    run(main())


def test_contexts_serve_concurrent_callers(llm: LLM) -> None:
    document, questions = "a document of some length", [" who?", " where?"]
    joined = [llm.encode(document) + llm.encode(q, begins=False) for q in questions]
    expected = [output.text for output in llm.generate(joined, SamplingParams(max_tokens=12))]

    async def main() -> list[str]:
        async with AsyncLLM(llm.model, kv_memory="16MiB") as served:
            name = await served.add_context(document, context_id="book")

            async def ask(question: str) -> str:
                params = SamplingParams(max_tokens=12)
                return "".join(
                    [i.text async for i in served.generate(question, params, context=name)]
                )

            answers = await asyncio.gather(*map(ask, questions))
            await served.delete_context("book")
            with pytest.raises(RequestError, match="no context"):
                await served.delete_context("book")
            assert served.engine.cache.bytes_in_use == 0
            return answers

    assert run(main()) == expected


def test_a_context_that_nobody_waits_for_is_not_kept(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncLLM(llm.model, kv_memory="16MiB", max_batch_tokens=16) as served:
            computing = asyncio.create_task(served.add_context(list(range(1, 200))))
            while not served.engine.stats.prefill_tokens:
                await asyncio.sleep(0)
            computing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await computing
            assert await served.read(lambda engine: engine.cache.bytes_in_use) == 0
            assert await served.read(lambda engine: list(engine.contexts)) == []
            with pytest.raises(RequestError, match="depends on the question"):
                await served.add_context([1, 2, 3], "snapkv()")

    run(main())
