"""Contexts: documents whose KV is computed once, and kept for many questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tamis.cache import Block, PagedCache, SequenceCache
from tamis.engine.lifecycle import Lifecycle
from tamis.errors import RequestError
from tamis.plan import Plan

if TYPE_CHECKING:
    from tamis.engine.prefix import PrefixReuse
    from tamis.engine.sequence import Sequence


@dataclass(eq=False)
class Context:
    """What a plan has made of a document's KV, at the document's end.

    Attributes:
        id: its name.
        tokens: the document.
        plan: what acted on it, and goes on to act on what follows.
        cache: its pages, of which every request takes a fork; None until they are computed.
        life: the plan at work on them; None for exact attention.
        prefix: the last block of the prefix tree that it shares.
        users: unfinished requests that go on from it.
        deleted: whether it is only kept for those.
    """

    id: str
    tokens: list[int]
    plan: Plan
    cache: SequenceCache | None = None
    life: Lifecycle | None = None
    prefix: Block | None = None
    users: int = 0
    deleted: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of its pages on the device."""
        return 0 if self.cache is None else self.cache.bytes


class Contexts:
    """The contexts of an engine, by their ids.

    Args:
        cache: where their pages lie.
        prefixes: of which contexts keep what they share.
    """

    def __init__(self, cache: PagedCache, prefixes: PrefixReuse) -> None:
        self._cache = cache
        self._prefixes = prefixes
        self._named: dict[str, Context] = {}
        self._kept: list[Context] = []  # the deleted ones that are in use among them

    def __iter__(self) -> Iterator[Context]:
        return iter(self._named.values())

    def __contains__(self, context_id: object) -> bool:
        return context_id in self._named

    @property
    def bytes(self) -> int:
        """Bytes of the pages of all that are kept, on the device, each counted once."""
        caches = [context.cache for context in self._kept if context.cache is not None]
        return self._cache.distinct_bytes(caches) if caches else 0

    def find(self, context_id: str) -> Context:
        """The context of that id.

        Raises:
            RequestError: there is none.
        """
        if context_id not in self._named:
            raise RequestError(
                f"there is no context {context_id!r}; it was deleted, or is not computed yet"
            )
        return self._named[context_id]

    def keep(self, context: Context, sequence: Sequence) -> None:
        """Take over the pages of a sequence that has computed a context's tokens."""
        context.cache, context.life = sequence.cache, sequence.life
        context.prefix = sequence.prefix
        sequence.cache = sequence.life = sequence.prefix = None
        self._named[context.id] = context
        self._kept.append(context)

    def delete(self, context_id: str) -> None:
        """Forget a context. Its pages are freed with the last request that goes on from it.

        Raises:
            RequestError: there is none.
        """
        context = self.find(context_id)
        del self._named[context_id]
        context.deleted = True
        self._free_unused(context)

    def leave(self, context: Context) -> None:
        """Note that a request which goes on from a context has ended."""
        context.users -= 1
        self._free_unused(context)

    def _free_unused(self, context: Context) -> None:
        if not context.deleted or context.users:
            return
        assert context.cache is not None
        context.cache.free()
        if context.prefix is not None:
            self._prefixes.tree.leave(context.prefix)
        self._kept.remove(context)


def check_context_plan(plan: Plan) -> None:
    """Refuse a plan whose KV serves one question only.

    Raises:
        RequestError: a method of it chooses by the question, which a context does not have.
    """
    choosing = [m.method_name() for m in plan.methods if m.query_dependent]
    if plan.tokens is not None and not choosing:
        choosing = [plan.tokens.method_name()]
    if choosing:
        raise RequestError(
            f"what {' and '.join(choosing)} keeps depends on the question at the prompt's end, so "
            "it cannot be kept as a context; use a plan that asks nobody, such as 'dense', "
            "'kivi()' or 'streamingllm()'"
        )


def asks_at_once(plan: Plan) -> bool:
    """Whether the tokens that follow a context may run in chunks, and the plan act at their end:
    it neither evicts between them, nor has each of them read a part only."""
    evicts = plan.evict is not None and plan.evict.interval is not None
    return plan.heads is None and plan.select is None and not evicts
