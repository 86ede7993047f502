"""The public API for servers: `AsyncLLM`, an `LLM` whose engine has a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from tamis.engine.engine import Engine
from tamis.engine.outputs import Increment
from tamis.engine.stream import RequestStream
from tamis.errors import EngineError, OverloadError, RequestError
from tamis.guide import JsonGuide, Vocabulary
from tamis.llm import LLM, Prompt
from tamis.model import Model
from tamis.plan import Plan
from tamis.sampling import SamplingParams

Read = TypeVar("Read")

_log = logging.getLogger(__name__)


class AsyncLLM:
    """An `LLM` whose engine runs in a thread of its own, for many concurrent callers.

        async with AsyncLLM("path/to/model") as llm:
            async for increment in llm.generate("Once upon a time"):
                print(increment.text, end="")

    Args:
        max_pending: increments of one completion that may wait for their reader; the request of
            one who falls further behind is ended.
        settings: as `LLM`.
    """

    def __init__(
        self, model: str | Path | Model, *, max_pending: int = 4096, **settings: Any
    ) -> None:
        self._llm = LLM(model, **settings)
        self._max_pending = max_pending
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}
        self._names = itertools.count()
        self._closed = False
        self._lock = threading.Lock()  # nothing is queued behind the command to close
        self._thread = threading.Thread(target=self._run, name="tamis-engine", daemon=True)
        self._thread.start()

    @property
    def model(self) -> Model:
        return self._llm.model

    @property
    def plan(self) -> Plan:
        """The plan of requests that bring none."""
        return self._llm.plan

    @property
    def engine(self) -> Engine:
        """The engine, for reading its counters; only its own thread may call it."""
        return self._llm.engine

    @property
    def alive(self) -> bool:
        """Whether requests are taken: it was not closed, and its thread runs."""
        return not self._closed and self._thread.is_alive()

    @property
    def has_chat_template(self) -> bool:
        """As `LLM.has_chat_template`."""
        return self._llm.has_chat_template

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """As `LLM.encode`."""
        return self._llm.encode(text, begins=begins)

    def encode_chat(self, messages: Seq[Mapping[str, str]]) -> list[int]:
        """As `LLM.encode_chat`."""
        return self._llm.encode_chat(messages)

    @property
    def vocabulary(self) -> Vocabulary:
        """As `LLM.vocabulary`."""
        return self._llm.vocabulary

    def json_guide(self, schema: Mapping[str, Any] | None = None) -> JsonGuide:
        """As `LLM.json_guide`."""
        return self._llm.json_guide(schema)

    async def submit(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams | None = None,
        plan: str | Plan | None = None,
        request_ids: Seq[str] | None = None,
        *,
        context: str | Seq[str] | None = None,
        priority: int = 0,
        user: str = "",
        max_wait_s: float | None = None,
    ) -> RequestStream:
        """Have prompts taken in, all of them or none.

        The caller reads the stream to its end, or calls `leave`.

        Args:
            prompts: one request each.
            params: of all of them.
            plan: of all of them; None is the `LLM`'s own, or the context's.
            request_ids: names, one per prompt; by default numbers.
            context: as `LLM.generate`.
            priority, user: what the engine's order may go by.
            max_wait_s: how long their first tokens may be expected to take.

        Raises:
            As `LLM.generate`; EngineError after `close()`; OverloadError where they would take
            longer than `max_wait_s`.
        """
        tokens = [await self._tokens(prompt, begins=not context) for prompt in prompts]
        asked = None if plan is None else Plan.parse(plan)
        its_params = params or SamplingParams()
        if request_ids is None:
            request_ids = [f"async-{next(self._names)}" for _ in prompts]

        def add(engine: Engine) -> Iterator[str]:
            its_plan = asked or self._llm.plan_after(context)
            for name, ids in zip(request_ids, tokens, strict=True):
                yield engine.add_request(
                    ids, its_params, its_plan, name, priority=priority, user=user, context=context
                )

        return await self._take_in(request_ids, add, max_wait_s, its_params.n)

    async def submit_context(
        self,
        document: Prompt,
        plan: str | Plan | None = None,
        context_id: str | None = None,
        *,
        priority: int = 0,
        user: str = "",
        max_wait_s: float | None = None,
    ) -> RequestStream:
        """Have a document taken in, to be computed and kept as a context.

        The stream brings one increment: its request id is the context's, which requests may name
        from then on. The caller reads it, or calls `leave`, which ends the computation, and
        `delete_context`, in case that it had ended by then.

        Args:
            document: a text or a list of token ids.
            plan: of the document and of what goes on from it; None is the `LLM`'s own.
            context_id: a name; by default a number.
            priority, user, max_wait_s: as of `submit`.

        Raises:
            As `LLM.add_context` where it refuses; EngineError and OverloadError as `submit`.
        """
        tokens = await self._tokens(document)
        its_plan = self._llm.plan if plan is None else Plan.parse(plan)
        name = f"context-{next(self._names)}" if context_id is None else context_id

        def add(engine: Engine) -> Iterator[str]:
            yield engine.add_context(tokens, its_plan, name, priority=priority, user=user)

        return await self._take_in([name], add, max_wait_s)

    async def add_context(
        self, document: Prompt, plan: str | Plan | None = None, context_id: str | None = None
    ) -> str:
        """Compute a document once, for requests that name its id as their `context`.

        Cancelling the task that waits for it frees its pages before the next step.

        Args:
            As `submit_context`.

        Returns:
            Its id. Its pages are kept until `delete_context`.

        Raises:
            As `LLM.add_context`; EngineError after `close()`.
        """
        stream = await self.submit_context(document, plan, context_id)
        [name] = stream.request_ids
        try:
            async for increment in stream:
                if increment.finish_reason != "stop":
                    raise RequestError(f"the context failed: {increment.error or 'it was aborted'}")
        except BaseException:
            with contextlib.suppress(EngineError):
                self._submit(lambda: self._forget(stream, stream.request_ids))
            raise
        return name

    async def delete_context(self, context_id: str) -> None:
        """As `LLM.delete_context`.

        Raises:
            RequestError: there is none of this id. EngineError: after `close()`.
        """
        await asyncio.wrap_future(self._submit(lambda: self._llm.engine.delete_context(context_id)))

    def leave(self, stream: RequestStream) -> None:
        """End what is left of a stream's requests; their pages are free before the next step.

        Returns at once; may be called at any time, from any thread.
        """
        with contextlib.suppress(EngineError):  # closed: they were aborted then
            self._submit(lambda: self._leave(stream))

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        plan: str | Plan | None = None,
        request_id: str | None = None,
        *,
        context: str | Seq[str] | None = None,
    ) -> AsyncIterator[Increment]:
        """Run one prompt; yields what each step adds, the whole output on the last increment.

        Leaving the iterator early, or cancelling the task that reads it, frees the request's
        pages before the next step. The request of a reader who falls `max_pending` increments
        behind ends with an error.

        Raises:
            As `LLM.generate`; EngineError after `close()`.
        """
        names = None if request_id is None else [request_id]
        stream = await self.submit([prompt], params, plan, names, context=context)
        try:
            async for increment in stream:
                yield increment
        finally:
            self.leave(stream)

    async def read(self, what: Callable[[Engine], Read]) -> Read:
        """What a function sees of the engine between two of its steps; it must change nothing.

        Raises:
            EngineError: after `close()`.
        """
        seen: list[Read] = []
        await asyncio.wrap_future(self._submit(lambda: seen.append(what(self._llm.engine))))
        return seen[0]

    async def abort(self, request_id: str) -> None:
        """End a request; its reader gets a last increment with finish_reason "abort"."""
        await asyncio.wrap_future(self._submit(lambda: self._abort(request_id)))

    async def abort_all(self, error: str) -> None:
        """End every request; readers get a last increment with finish_reason "error"."""
        await asyncio.wrap_future(self._submit(lambda: self._abort_all(error)))

    def close(self) -> None:
        """Abort all requests and end the engine's thread. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    async def _tokens(self, prompt: Prompt, *, begins: bool = True) -> Seq[int]:
        if not isinstance(prompt, str):
            return prompt
        return await asyncio.to_thread(self.encode, prompt, begins=begins)

    async def _take_in(
        self,
        names: Seq[str],
        add: Callable[[Engine], Iterable[str]],
        max_wait_s: float | None,
        n_completions: int = 1,
    ) -> RequestStream:
        """Have the engine's thread `add` what it then names, all of it or nothing."""
        loop = asyncio.get_running_loop()
        stream = RequestStream(loop, names, self._max_pending * n_completions)

        taken: list[str] = []

        def take_in() -> None:
            engine = self._llm.engine
            try:
                for name in add(engine):
                    taken.append(name)
                    self._streams[name] = stream
                if max_wait_s is not None:
                    _check_wait(engine, stream.request_ids, max_wait_s)
            except BaseException:
                self._leave(stream)
                raise

        try:
            await asyncio.wrap_future(self._submit(take_in))
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):
                self._submit(lambda: self._forget(stream, taken))
            raise
        return stream

    def _submit(self, action: Callable[[], None]) -> Future[None]:
        """Have the engine's thread run `action` between two steps."""
        command = _Command(action)
        with self._lock:
            if self._closed:
                raise EngineError("this AsyncLLM is closed")
            self._commands.put(command)
        return command.done

    # --- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        """Commands first, then a step, until it is closed. Whatever happens, nobody waits on."""
        try:
            while True:
                try:
                    command = self._commands.get(block=self._llm.engine.idle)
                except queue.Empty:
                    self._step()
                    continue
                if command is None:
                    self._abort_all()
                    return
                command.run()
        except BaseException:
            _log.critical("the engine's thread died", exc_info=True)
        finally:
            self._end()

    def _end(self) -> None:
        """Take nothing more, and fail what is open after the thread has died."""
        reason = "the engine has ended; restart it"
        with self._lock:
            self._closed = True
        for stream in {id(stream): stream for stream in self._streams.values()}.values():
            stream.fail(reason)
            self._wake([stream])
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    command.done.set_exception(EngineError(reason))

    def _step(self) -> None:
        try:
            increments = self._llm.engine.step()
        except Exception as error:
            _log.exception("the engine failed outside the model; every request is aborted")
            self._abort_all(f"the engine failed: {type(error).__name__}")
            return
        self._deliver(increments)

    def _abort_all(self, error: str | None = None) -> None:
        for request_id in list(self._streams):
            self._abort(request_id, error)

    def _abort(self, request_id: str, error: str | None = None) -> None:
        self._deliver(self._llm.engine.abort(request_id, error))

    def _leave(self, stream: RequestStream) -> None:
        for request_id in stream.request_ids:
            if self._streams.get(request_id) is stream:  # not somebody else's request of that name
                self._abort(request_id)

    def _forget(self, stream: RequestStream, names: Iterable[str]) -> None:
        """Leave a stream, and delete the contexts of those names where they are computed."""
        self._leave(stream)
        for name in names:
            if name in self._llm.engine.contexts:
                self._llm.engine.delete_context(name)

    def _deliver(self, increments: Iterable[Increment]) -> None:
        """Hand increments to their streams, and wake each reader's loop once."""
        awake: dict[int, RequestStream] = {}
        for increment in increments:
            stream = self._streams.get(increment.request_id)
            if stream is None:
                continue
            if increment.output is not None:
                del self._streams[increment.request_id]
            stream.put(increment)
            awake[id(stream)] = stream
        self._wake(awake.values())
        for stream in awake.values():
            if stream.overdue:
                reason = "the answer was not read as fast as it was generated"
                for request_id in stream.request_ids:
                    if self._streams.get(request_id) is stream:
                        self._abort(request_id, reason)

    def _wake(self, streams: Iterable[RequestStream]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[RequestStream]] = {}
        for stream in streams:
            by_loop.setdefault(stream.loop, []).append(stream)
        for loop, of_loop in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake_all, of_loop)
            except RuntimeError:  # the loop is closed, and its readers are gone
                for stream in of_loop:
                    self._leave(stream)


class _Command:
    """Something for the engine's thread to do."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.done: Future[None] = Future()
        self._action = action

    def run(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self._action()
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


def _wake_all(streams: Iterable[RequestStream]) -> None:
    for stream in streams:
        stream.wake()


def _check_wait(engine: Engine, request_ids: Iterable[str], most_s: float) -> None:
    wait_s = max(engine.expected_wait_s(request_id) for request_id in request_ids)
    if wait_s > most_s:
        raise OverloadError(
            f"the first token is expected in {wait_s:.1f} s, where {most_s:g} s are the most; "
            "try again later",
            retry_s=wait_s - most_s,
        )
