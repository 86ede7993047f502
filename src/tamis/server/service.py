"""From a request to its answer: what both generating endpoints do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from tamis.async_llm import AsyncLLM
from tamis.errors import TamisError
from tamis.server import chat, completions
from tamis.server.admission import Admission
from tamis.server.answer import Head, Job, Writer
from tamis.server.chat import ChatWriter
from tamis.server.completions import CompletionWriter
from tamis.server.connection import ClientGone, unless_gone
from tamis.server.contexts import Contexts, Kept
from tamis.server.errors import ApiError, explain
from tamis.server.generation import Generation
from tamis.server.jobs import Jobs, Sender
from tamis.server.logs import GONE
from tamis.server.metrics import Metrics
from tamis.server.protocol import (
    ChatRequest,
    CompletionRequest,
    ContextCard,
    ContextRequest,
    Message,
    TokenizeRequest,
)
from tamis.server.recent import Recent
from tamis.server.settings import Settings
from tamis.server.stream import DONE, EventStream, error_event, event
from tamis.server.tokens import TokenTexts

Prepare = Callable[[], Awaitable[tuple[Job, Writer]]]

_T = TypeVar("_T")


class Service:
    """Answers requests with one model.

    Args:
        llm: the model in its engine.
        settings: of the server.

    Raises:
        RequestError: the model has no tokenizer, without which there is no text to serve.
    """

    def __init__(self, llm: AsyncLLM, settings: Settings) -> None:
        self.llm = llm
        self.settings = settings
        self.admission = Admission(settings.max_requests)
        self.contexts = Contexts(llm, settings.context_memory)
        self.metrics = Metrics(llm.engine, self.admission, self.contexts)
        self.recent = Recent()
        self._texts = TokenTexts(llm.vocabulary)
        self._bos = getattr(llm.model.tokenizer, "bos_token_id", None)
        self._jobs = Jobs(llm, settings, self.contexts)

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its completion at the most."""
        return self.llm.model.max_length

    async def complete(self, request: CompletionRequest, sender: Sender) -> tuple[Job, Writer]:
        """What a request of `/v1/completions` asks for, and who writes its answer."""
        self.check_model(request.model)
        own = completions.sampling(request)
        prompts = completions.prompts(request)
        ids = await asyncio.to_thread(self._encode, prompts, begins=not request.contexts)
        job = await self._jobs.generating(request, ids, own, sender)
        head = Head.new("cmpl", request.model)
        echoed: list[str] = []
        if request.echo:
            echoed = [p if isinstance(p, str) else self._texts.decode(p) for p in prompts]
        return job, CompletionWriter(request, head, self._texts, echoed)

    async def chat(self, request: ChatRequest, sender: Sender) -> tuple[Job, Writer]:
        """What a request of `/v1/chat/completions` asks for, and who writes its answer."""
        self.check_model(request.model)
        own = chat.sampling(request)
        ids = await self._encode_chat(request.messages)
        if request.contexts and ids[0] == self._bos:
            ids = ids[1:]  # the document has begun already
        job = await self._jobs.generating(request, [ids], own, sender)
        return job, ChatWriter(request, Head.new("chatcmpl", request.model), self._texts)

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """The token ids of a text or a conversation.

        Raises:
            ApiError: the request has neither, or both.
        """
        prompt, messages = request.prompt, request.messages
        if prompt is not None and messages is None:
            return await asyncio.to_thread(self.llm.encode, prompt)
        if messages is not None and prompt is None:
            return await self._encode_chat(messages)
        raise ApiError(400, "give either prompt or messages", param="prompt")

    async def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return await asyncio.to_thread(self.llm.encode_chat, chat.conversation(messages))

    def sender_of(self, request: Request, named: str | None = None) -> Sender:
        """Who sent a request that names a user."""
        keys = self.settings.api_keys
        owner = str(request.state.key) if keys else ""
        return Sender(owner if len(keys) > 1 else named or "", owner)

    def check_model(self, name: str) -> None:
        """Refuse a request for a model that is not served."""
        if name != self.settings.name:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; use {self.settings.name!r}",
                "model_not_found",
                "model",
            )

    async def answer(self, request: Request, streamed: bool, prepare: Prepare) -> Response:
        """Admit a request, run it, and answer it.

        The request holds its place until its answer has ended, and its pages no longer than its
        client stays.

        Raises:
            ApiError, TamisError: it was refused, or failed.
        """
        deadline = self._deadline()
        log: dict[str, Any] = request.state.log
        log["streamed"] = streamed
        with ExitStack() as place:
            place.enter_context(self.admission.request())
            generation, writer = await _attended(request, self._start(prepare, deadline, log))
            place.callback(self._end, generation, log)
            if not streamed:
                outputs = await _attended(request, generation.finish())
                return _json(writer.whole(outputs).model_dump_json())
            events = self._events(generation, writer, log)
            return EventStream(events, self.settings.write_timeout, place.pop_all().close)

    async def keep(self, request: Request, body: ContextRequest) -> ContextCard:
        """Have a document computed and kept as a context, while its client waits.

        Raises:
            ApiError, TamisError: it was refused, or failed.
        """
        sender = self.sender_of(request, body.user)
        with self.admission.request():
            kept = await _attended(
                request, self._keep(body, sender, self._deadline(), request.state.log)
            )
        return self.card(kept)

    def card(self, kept: Kept) -> ContextCard:
        """A context as its owner sees it."""
        return ContextCard(
            id=kept.id,
            created=kept.created,
            model=self.settings.name,
            tokens=kept.tokens,
            kv_plan=str(kept.plan),
            kv_bytes=kept.kv_bytes,
            kv_bytes_dense=kept.kv_bytes_dense,
        )

    def _deadline(self) -> float:
        """The loop's time at which a request that comes now must have ended."""
        return asyncio.get_running_loop().time() + self.settings.request_timeout

    async def _keep(
        self, body: ContextRequest, sender: Sender, deadline: float, log: dict[str, Any]
    ) -> Kept:
        async with asyncio.timeout_at(deadline):
            if body.model is not None:
                self.check_model(body.model)
            document = body.document
            if isinstance(document, str):
                document = await asyncio.to_thread(self.llm.encode, document)
            job = self._jobs.keeping(body, document, sender)
            log["plan"] = str(job.plan)
            log["prompt_tokens"] = len(document)
            return await self.contexts.add(
                sender.owner, body.id, job, deadline, self.settings.max_wait
            )

    async def _start(
        self, prepare: Prepare, deadline: float, log: dict[str, Any]
    ) -> tuple[Generation, Writer]:
        async with asyncio.timeout_at(deadline):
            job, writer = await prepare()
            log["plan"] = str(job.plan)
            log["prompt_tokens"] = sum(map(len, job.prompts))
            most = self.settings.max_wait
            return await Generation.start(self.llm, job, deadline, most), writer

    async def _events(
        self, generation: Generation, writer: Writer, log: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        """The answer as encoded events, an error as the last one where there is one."""

        def encode(objects: Any) -> bytes:
            return b"".join(event(o.model_dump_json()) for o in objects)

        yield encode(writer.opening())
        try:
            async for batch in generation.batches():
                yield b"".join(encode(writer.events(number, i)) for number, i in batch)
            yield encode(writer.closing(generation.in_order))
        except (ApiError, TamisError) as error:
            failure = error if isinstance(error, ApiError) else explain(error)
            log["error"] = str(failure)
            yield error_event(failure.body)
        yield DONE

    def _end(self, generation: Generation, log: dict[str, Any]) -> None:
        """Leave the engine, and note what became of the request."""
        generation.end()
        outputs = generation.in_order
        self.metrics.ended(outputs)
        self.recent.add(log["plan"], outputs)
        log["output_tokens"] = sum(output.metrics.output_tokens for output in outputs)
        log["kv_bytes_peak"] = sum(output.metrics.kv_bytes_peak for output in outputs)
        if outputs:
            log["finish_reason"] = outputs[0].finish_reason
            log["ttft_s"] = outputs[0].metrics.ttft_s

    def _encode(
        self, prompts: Sequence[str] | Sequence[list[int]], *, begins: bool = True
    ) -> list[list[int]]:
        return [self.llm.encode(p, begins=begins) if isinstance(p, str) else p for p in prompts]


async def _attended(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns; it ends with its client's patience.

    Raises:
        ApiError: the client went away, or the time is over.
    """
    try:
        return await unless_gone(request.receive, work)
    except ClientGone:
        request.state.log["gone"] = True
        raise ApiError(GONE, "the client went away") from None
    except TimeoutError:
        raise ApiError(504, "the request took too long to begin", "timeout") from None


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")
