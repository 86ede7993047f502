"""Which requests an engine takes in."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from tamis.cache import PagedCache
from tamis.engine.context import Context, Contexts
from tamis.engine.lifecycle import Lifecycle, columns
from tamis.engine.memory import added_at_once, prompt_tokens_held
from tamis.errors import ConfigError, KVMemoryError, PlanError, RequestError
from tamis.methods.base import Reuse
from tamis.methods.registry import methods
from tamis.methods.views import ModelShape
from tamis.model import Model
from tamis.model.model import UNLIMITED
from tamis.plan import Plan
from tamis.platform import format_bytes
from tamis.sampling import SamplingParams


class Admission:
    """Refuses what could never be served, before any of it is computed.

    Args:
        model: whose vocabulary, context and position embeddings bound a request.
        cache: whose memory does.
        shape: the model's, for plans.
        contexts: what is kept beside every request.
        max_batch_tokens: the most tokens of one step.
        max_running: the most sequences that hold pages at once.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        shape: ModelShape,
        contexts: Contexts,
        *,
        max_batch_tokens: int,
        max_running: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._shape = shape
        self._contexts = contexts
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self._sound: set[Plan] = set()  # plans that fit this model

    def check_contexts(
        self,
        contexts: Sequence[Context],
        plan: Plan | None,
        params: SamplingParams,
        *,
        traced: bool,
    ) -> None:
        """Refuse contexts that a request cannot go on from.

        Args:
            contexts: those that it names, in order; none of them is no reason to refuse it.
            plan: what it asks for; None is its context's, or exact attention.
            params: what it is to generate.
            traced: whether an inspection is to follow it.

        Raises:
            RequestError: one lives by another plan, the plan does not join several, or something
                is asked about tokens that are not computed.
        """
        if not contexts:
            return
        reuse = None if plan is None else plan.reuse
        if len(contexts) > 1 and reuse is None:
            raise RequestError(
                f"the request names {len(contexts)} contexts, and the plan {plan or Plan()} goes "
                f"on from one; {_joining()} would join them"
            )
        first = contexts[0]
        if reuse is not None:
            _check_exact(contexts, reuse)
        elif plan is not None and plan != first.plan:
            raise RequestError(
                f"the context {first.id!r} lives by the plan {first.plan}, so its requests "
                f"cannot live by {plan}; leave their plan out"
            )
        if params.prompt_logprobs is not None or traced:
            raise RequestError(
                "a request that goes on from a context does not compute its prompt, so it has "
                "neither prompt_logprobs nor an inspection"
            )

    def max_new(
        self,
        prompt: list[int],
        params: SamplingParams,
        plan: Plan,
        n_own: int,
        joined: Sequence[Context],
    ) -> int:
        """Check a request that would run alone.

        Args:
            prompt: token ids, those of its contexts first.
            params: what to generate.
            plan: how its KV cache lives.
            n_own: how many of the prompt's tokens come after its contexts.
            joined: the contexts that the plan lays out in pages of its own.

        Returns:
            The most tokens it may generate, 1 or more: as many as `params` say or, where they do
            not, as the cache holds; and no more than the model's context leaves.

        Raises:
            RequestError: the prompt is empty, too long or not of the vocabulary, or `params` ask
                for what this model or plan does not give.
            PlanError: the plan does not fit this model.
            KVMemoryError: the cache could not hold the request.
        """
        self._check_plan(plan, params, n_joined=len(joined))
        longest = self._longest(plan)
        self._check_prompt(prompt, longest)
        self._check_params(params)
        room = longest - len(prompt)
        n_added = n_own + sum(len(context.tokens) for context in joined)
        if joined and not plan.compresses and not columns(plan, self._shape):
            n_added -= len(joined[0].tokens)  # its pages are shared
        if params.max_tokens is None:
            max_new = self._most_new(plan, n_added, room)
        else:
            max_new = min(params.max_tokens, room)
        least = params.least_tokens
        if least > max_new:
            raise RequestError(
                f"max_tokens, or what the prompt leaves of the model's context, is {max_new} "
                f"tokens, and an output that is as asked may take {least}; allow at least as many"
            )
        self._check_memory(plan, n_added, max_new)
        return max_new

    def _check_plan(self, plan: Plan, params: SamplingParams, n_joined: int) -> None:
        """Refuse a plan that does not fit this model, or what is asked of the request."""
        if plan.tokens is not None and params.prompt_logprobs is not None:
            raise RequestError(
                f"prompt_logprobs need every token of the prompt at the last layer, where "
                f"{plan.tokens.method_name()} does not bring them all"
            )
        if n_joined > 1 and not self._model.can_shift:
            raise PlanError(
                f"{plan.reuse} moves keys to other positions, which this model's position "
                "embeddings do not allow; its requests can name one context only"
            )
        if plan.dense or plan in self._sound:
            return
        evict = plan.whole().evict
        if evict is not None and evict.in_cache_positions and not self._model.can_shift:
            raise PlanError(
                f"{evict.method_name()} moves keys to other positions, which this model's "
                "position embeddings do not allow; its in-cache positions can be switched off"
            )
        try:
            empty = self._cache.new_sequence(columns(plan, self._shape))
            Lifecycle(plan, self._shape, empty, 1, self._model.shift_keys)
            if plan.tokens is not None:
                next(plan.tokens.program(1, self._shape))
            if plan.reuse is not None and plan.reuse.program([1, 1], 3, self._shape) is not None:
                _ = self._model.decoder_layers  # or it cannot run layer by layer
        except ConfigError as error:
            raise PlanError(f"the plan {plan} does not fit this cache: {error}") from error
        self._sound.add(plan)

    def _longest(self, plan: Plan) -> int:
        """The most tokens of a request: the model's context, unless positions are those in the
        cache."""
        in_cache = plan.evict is not None and plan.evict.in_cache_positions
        return UNLIMITED if in_cache and plan.heads is None else self._model.max_length

    def _check_prompt(self, prompt: list[int], longest: int) -> None:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        vocab_size = self._model.vocab_size
        bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {vocab_size} tokens")
        if len(prompt) >= longest:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but the model's context is "
                f"{longest} tokens, of which one must be left for the answer"
            )

    def _check_params(self, params: SamplingParams) -> None:
        if params.n > self._max_running:
            raise RequestError(
                f"n={params.n} is more than the {self._max_running} sequences that may "
                "run at once (max_running, max_batch_tokens)"
            )
        params.validate_for(self._model.vocab_size)
        if params.stop and self._model.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model directory has none")

    def _most_new(self, plan: Plan, n_prompt: int, room: int) -> int:
        """The most new tokens, 1 .. `room`, with which a request fits the cache."""

        def refused(max_new: int) -> bool:
            try:
                self._check_memory(plan, n_prompt, max_new)
            except KVMemoryError:
                return True
            return False

        return max(1, bisect_left(range(1, room + 1), True, key=refused))

    def _check_memory(self, plan: Plan, n_prompt: int, max_new: int) -> None:
        """Refuse what the cache cannot hold; the last token's KV is never written to it.

        Of a plan that compresses only the prompt is counted, because what is left of it is known
        when it has been computed. Contexts stay where they are.
        """
        layout, capacity = self._cache.layout, self._cache.capacity_bytes
        n_cached = n_prompt + max_new - 1
        if plan.compresses:
            n_cached = prompt_tokens_held(plan, n_prompt, layout.page_size, layout.page_size)
        side = columns(plan, self._shape)
        asked = (
            f"a request of {n_prompt} prompt and {max_new} new tokens needs about "
            f"{format_bytes(layout.bytes_for(n_cached))} of KV memory"
        )
        if not self._cache.fits(n_cached, chunk=added_at_once(plan, 1), columns=side):
            chunk = added_at_once(plan, self._max_batch_tokens)
            enough = self._cache.required_bytes(n_cached, chunk=chunk, columns=side)
            raise KVMemoryError(
                f"{asked}, but kv_memory is {format_bytes(capacity)}; kv_memory={enough} would do"
            )
        kept = self._contexts.bytes
        if kept and layout.bytes_for(n_cached) + kept > capacity:
            raise KVMemoryError(
                f"{asked}, and contexts keep {format_bytes(kept)} of {format_bytes(capacity)}; "
                "delete one that nobody asks about any more"
            )


def _joining() -> str:
    """The plans that join contexts, as a reader would write them."""
    names = [name for name, method in methods().items() if method.stage == Reuse.stage]
    return " or ".join(f"'{name}()'" for name in names)


def _check_exact(contexts: Sequence[Context], reuse: Reuse) -> None:
    """Refuse contexts that are not those of exact attention.

    Raises:
        RequestError: one lives by another plan.
    """
    for context in contexts:
        if not context.plan.dense:
            raise RequestError(
                f"{reuse} joins contexts that were computed exactly, and {context.id!r} lives by "
                f"the plan {context.plan}; add it again with the plan 'dense'"
            )
