"""The contexts that clients have computed: whose they are, and how much memory they may take."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tamis.async_llm import AsyncLLM
from tamis.engine.outputs import RequestOutput
from tamis.errors import TamisError
from tamis.plan import Plan
from tamis.platform import format_bytes
from tamis.server.answer import Job
from tamis.server.errors import ApiError
from tamis.server.generation import Generation

_SHARE = 2
"""Contexts may take this part of the KV memory, a half, where the operator does not say."""


@dataclass(frozen=True)
class Kept:
    """A context that requests may name.

    Attributes:
        id: its owner's name for it; `name` is the engine's.
        created: seconds since 1970.
        plan: what acted on it, and acts on what goes on from it.
        kv_bytes: its pages, those included that it shares; `kv_bytes_dense`: of exact attention.
    """

    id: str
    name: str
    created: int
    tokens: int
    plan: Plan
    kv_bytes: int
    kv_bytes_dense: int


class Contexts:
    """The contexts of one server. An owner sees only their own.

    Args:
        llm: where they are computed and kept.
        most_bytes: of all their pages; None is a half of the KV memory.
    """

    def __init__(self, llm: AsyncLLM, most_bytes: int | None) -> None:
        self._llm = llm
        capacity = llm.engine.cache.capacity_bytes
        self.most_bytes = capacity // _SHARE if most_bytes is None else most_bytes
        self._kept: dict[tuple[str, str], Kept] = {}
        self._coming: set[tuple[str, str]] = set()
        self._counting = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes of their pages; what several share counts for each."""
        return sum(kept.kv_bytes for kept in self._kept.values())

    def of(self, owner: str) -> list[Kept]:
        """An owner's contexts, the oldest first."""
        return [kept for (its_owner, _), kept in self._kept.items() if its_owner == owner]

    def find(self, owner: str, context_id: str) -> Kept:
        """An owner's context.

        Raises:
            ApiError: they have none of this id.
        """
        kept = self._kept.get((owner, context_id))
        if kept is None:
            raise ApiError(
                404,
                f"there is no context {context_id!r}; POST /v1/contexts makes one",
                "context_not_found",
            )
        return kept

    async def add(
        self,
        owner: str,
        context_id: str | None,
        job: Job,
        deadline: float,
        max_wait: float | None,
    ) -> Kept:
        """Have a job's one prompt computed, and keep its KV.

        Args:
            context_id: by default a random one.
            deadline, max_wait: as of `Generation`.

        Raises:
            ApiError, TamisError: the id is taken, the contexts would take too much memory, or the
                computation was refused or failed. Nothing is kept then, nor when this is cancelled.
        """
        context_id = context_id or f"ctx-{uuid.uuid4().hex}"
        key = owner, context_id
        if key in self._kept or key in self._coming:
            raise ApiError(
                409, f"there is a context {context_id!r} already; delete it first", "context_exists"
            )
        self._coming.add(key)
        name = f"{context_id}@{owner}"
        try:
            await self._check_before(job)
            keeping = replace(job, keep_as=name)
            generation = await Generation.start(self._llm, keeping, deadline, max_wait)
            try:
                outputs = await generation.finish()
                await self._check_after(name)
            except BaseException:
                generation.end()
                with contextlib.suppress(TamisError):
                    await self._llm.delete_context(name)
                raise
            self._kept[key] = _kept(context_id, name, job.plan, outputs)
            return self._kept[key]
        finally:
            self._coming.discard(key)

    async def delete(self, owner: str, context_id: str) -> None:
        """Forget an owner's context; requests that go on from it do so to their ends.

        Raises:
            ApiError: they have none of this id.
        """
        kept = self.find(owner, context_id)
        del self._kept[owner, context_id]
        await self._llm.delete_context(kept.name)

    async def _check_before(self, job: Job) -> None:
        """Refuse what is certain to take too much, before it is computed."""
        least = 1
        if job.plan.dense:
            least = self._llm.engine.layout.bytes_for(sum(map(len, job.prompts)))
        in_use = await self._in_use()
        if in_use >= self.most_bytes or least > self.most_bytes:
            raise self._full(in_use)

    async def _check_after(self, name: str) -> None:
        """Delete a context that is one too many. One at a time, so that none goes for another."""
        async with self._counting:
            in_use = await self._in_use()
            if in_use > self.most_bytes:
                await self._llm.delete_context(name)
                raise self._full(in_use)

    async def _in_use(self) -> int:
        return await self._llm.read(lambda engine: engine.context_bytes)

    def _full(self, in_use: int) -> ApiError:
        return ApiError(
            400,
            f"contexts may take {format_bytes(self.most_bytes)} of this server's memory, which "
            f"this one would exceed ({format_bytes(in_use)} are in use); delete one, or give a "
            "shorter document or a plan that takes less",
            "context_memory_exceeded",
        )


def _kept(context_id: str, name: str, plan: Plan, outputs: Sequence[RequestOutput]) -> Kept:
    [output] = outputs
    metrics = output.metrics
    return Kept(
        context_id,
        name,
        int(time.time()),
        metrics.prompt_tokens,
        plan,
        metrics.kv_bytes,
        metrics.kv_bytes_dense,
    )
