"""A job at work in the engine, from its admission to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from tamis.async_llm import AsyncLLM
from tamis.engine.outputs import Increment, RequestOutput
from tamis.engine.stream import RequestStream
from tamis.server.answer import Job
from tamis.server.errors import ApiError

Batch = list[tuple[int, Increment]]


class Generation:
    """What a job's prompts gain, step by step. Whoever starts one ends it.

    Args:
        llm: where it runs.
        stream: of its requests, in the order of its prompts.
        deadline: the loop's time at which it must have ended.

    Attributes:
        outputs: of the prompts that have ended, by their numbers.
    """

    def __init__(self, llm: AsyncLLM, stream: RequestStream, deadline: float) -> None:
        self.outputs: dict[int, RequestOutput] = {}
        self._llm = llm
        self._stream = stream
        self._deadline = deadline
        self._numbers = {name: number for number, name in enumerate(stream.request_ids)}

    @classmethod
    async def start(
        cls, llm: AsyncLLM, job: Job, deadline: float, max_wait: float | None
    ) -> Generation:
        """Have the engine take a job in, if it is expected to begin in time.

        Args:
            max_wait: seconds until its first token at the most; None leaves it to the deadline.

        Raises:
            TamisError: the engine refuses it.
        """
        left_s = deadline - asyncio.get_running_loop().time()
        most_s = left_s if max_wait is None else min(max_wait, left_s)
        if job.keep_as is None:
            stream = await llm.submit(
                job.prompts,
                job.params,
                job.plan,
                context=job.context,
                priority=job.priority,
                user=job.user,
                max_wait_s=most_s,
            )
        else:
            [document] = job.prompts
            stream = await llm.submit_context(
                document,
                job.plan,
                job.keep_as,
                priority=job.priority,
                user=job.user,
                max_wait_s=most_s,
            )
        return cls(llm, stream, deadline)

    async def batches(self) -> AsyncIterator[Batch]:
        """Increments with the numbers of their prompts, as many at once as there are.

        Raises:
            ApiError: a prompt could not go on, or the time is over.
        """
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    increments = await self._stream.batch()
            except TimeoutError:
                raise ApiError(504, "the request took too long and was ended", "timeout") from None
            if not increments:
                return
            batch = [(self._numbers[i.request_id], i) for i in increments]
            for number, increment in batch:
                if increment.finish_reason == "error":
                    raise ApiError(500, f"generation failed: {increment.error}", "failed")
                if increment.finish_reason == "abort":
                    raise ApiError(503, "the server ended the request because it stops", "stopping")
                if increment.output is not None:
                    self.outputs[number] = increment.output
            yield batch

    async def finish(self) -> Sequence[RequestOutput]:
        """Wait for the end; the outputs in the order of the prompts.

        Raises:
            As `batches`.
        """
        async for _ in self.batches():
            pass
        return self.in_order

    @property
    def in_order(self) -> Sequence[RequestOutput]:
        """The outputs there are, in the order of the prompts."""
        return [output for _, output in sorted(self.outputs.items())]

    def end(self) -> None:
        """Leave the engine; what has not ended is aborted, and its pages are freed."""
        self._llm.leave(self._stream)
