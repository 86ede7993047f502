"""The engine: requests in, increments out, one `step()` at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from tamis.cache import CacheLayout, LayerShape, PagedCache
from tamis.engine import draft as drafts
from tamis.engine import inspection
from tamis.engine.admission import Admission
from tamis.engine.context import Context, Contexts, check_context_plan
from tamis.engine.flat import FlatBatch, as_logprob
from tamis.engine.graphs import Capture, DecodeGraphs
from tamis.engine.layered import Member, StepBatch
from tamis.engine.order import FirstCome, Order
from tamis.engine.outputs import FinishReason, Increment, TokenLogprob
from tamis.engine.pace import Full, Pace
from tamis.engine.prefix import PrefixReuse
from tamis.engine.program import Program
from tamis.engine.sampler import Sampled, SamplerState, sample
from tamis.engine.scheduler import Preemption, Scheduler, Work
from tamis.engine.sequence import Request, Sequence, Status
from tamis.engine.text import TextStream
from tamis.engine.trace import Trace
from tamis.engine.wait import expected_wait_s
from tamis.errors import ConfigError, KVMemoryError, RequestError
from tamis.methods.views import LayerShape as MethodLayerShape
from tamis.methods.views import ModelShape
from tamis.model import Model
from tamis.plan import Plan
from tamis.platform import format_bytes
from tamis.sampling import SamplingParams

_log = logging.getLogger(__name__)

_TEXT_CONTEXT = 8
"""Last tokens of the prompt that the text of the output is decoded after."""


@dataclass
class EngineStats:
    """Counters since the engine was made. Seconds are wall clock.

    Attributes:
        step_s: time in `Engine.step`; forward_s: the part of it inside the model's forward.
        prefill_tokens: tokens computed in chunks; decode_tokens: tokens computed one by one.
        drafted, accepted: tokens that plans proposed, and those of them that were right.
    """

    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Continuous batching over one model and one paged cache. Not thread-safe.

    Args:
        model: a loaded model.
        kv_bytes: memory for pages, in bytes.
        max_batch_tokens: the most tokens of one step.
        page_size: tokens per page.
        max_running: the most sequences that hold pages at once.
        preemption: "recompute" forgets the pages of a preempted sequence, "swap" moves them to
            `swap_bytes` bytes of host memory (and forgets them when those are full).
        host_bytes: host memory for the pages of plans that place them there.
        order: who goes first; by default who came first.
        pace: how many prompt tokens join a step in which other requests decode; by default as many
            as fit.
        prefix_cache: whether requests begin with the pages that earlier ones computed for the same
            tokens. These are kept in `kv_bytes` until somebody else needs the room, and then in
            what preempted requests leave of `swap_bytes`.
        capture: how decode steps are recorded to be run again (`tamis.engine.graphs`); None runs
            each of them anew.

    Attributes:
        graphs: the recorded decode steps, None without `capture`.
        admission: which requests are taken in.
        prefixes: what is kept for later requests, with counters.
        contexts: what `add_context` has computed.

    Raises:
        ConfigError: a setting is out of range.
        KVMemoryError: `kv_bytes` cannot hold even one page per head.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_bytes: int,
        max_batch_tokens: int = 2048,
        page_size: int = 64,
        max_running: int = 256,
        preemption: Preemption = "recompute",
        swap_bytes: int = 0,
        host_bytes: int = 0,
        order: Order | None = None,
        pace: Pace | None = None,
        prefix_cache: bool = False,
        capture: Capture | None = None,
    ) -> None:
        for name, value in (
            ("max_batch_tokens", max_batch_tokens),
            ("page_size", page_size),
            ("max_running", max_running),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
        if preemption not in ("recompute", "swap"):
            raise ConfigError(f"preemption must be 'recompute' or 'swap', got {preemption!r}")
        self.model = model
        self.layout = CacheLayout(
            page_size=page_size,
            dtype=model.dtype,
            layers=tuple(
                LayerShape(spec.kv_heads, spec.k_dim, spec.v_dim, spec.window)
                for spec in model.layers
            ),
        )
        self.cache = PagedCache(self.layout, kv_bytes, model.device, swap_bytes, host_bytes)
        if not self.cache.fits(1):
            least = format_bytes(self.cache.required_bytes(1))
            raise KVMemoryError(
                f"kv_memory of {format_bytes(kv_bytes)} holds no page for every KV head of this "
                f"model; the least is {least}, for {page_size} tokens"
            )
        self.shape = _shape(model)
        # Where keys depend on the length of what they are part of, a prefix is not its own.
        same = not model.dynamic_rope
        self.prefixes = PrefixReuse(self.cache, self.shape, enabled=prefix_cache and same)
        self.contexts = Contexts(self.cache, self.prefixes)
        self.scheduler = Scheduler(
            self.cache,
            max_batch_tokens,
            max_running,
            preemption,
            self.shape,
            model.shift_keys,
            order or FirstCome(),
            pace or Full(),
            self.prefixes,
        )
        self.admission = Admission(
            model,
            self.cache,
            self.shape,
            self.contexts,
            max_batch_tokens=self.scheduler.max_batch_tokens,
            max_running=self.scheduler.max_running,
        )
        self.graphs = None if capture is None else DecodeGraphs(model, self.cache, capture)
        self.stats = EngineStats()
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()

    @property
    def idle(self) -> bool:
        """True when every request has ended."""
        return not self._requests

    def add_request(
        self,
        prompt_ids: Seq[int],
        params: SamplingParams,
        plan: Plan | None = None,
        request_id: str | None = None,
        trace: Trace | None = None,
        *,
        priority: int = 0,
        user: str = "",
        context: str | Seq[str] | None = None,
    ) -> str:
        """Take a request in; its work begins with the next `step()`.

        Args:
            prompt_ids: token ids, at least one.
            params: what to generate.
            plan: how its KV cache lives; by default exactly, or as its context's.
            request_id: a name of the caller's; by default a number.
            trace: where to record what the plan does.
            priority, user: what the engine's order may go by.
            context: the id of a context that the prompt goes on from; or the ids of several that
                come before it one after the other, under a plan that says how (a method of the
                stage `reuse`).

        Returns:
            The request's id.

        Raises:
            RequestError: empty or too long prompt, token ids out of the vocabulary, stop strings
                without a tokenizer, `n` larger than `max_running`, an id already in use, an unknown
                context, one of another plan, or several under a plan that does not join them.
            KVMemoryError: the cache could not hold this request even alone.
            PlanError: the plan does not fit this model.
        """
        names = [context] if isinstance(context, str) else list(context or ())
        contexts = [self.contexts.find(name) for name in names]
        self.admission.check_contexts(contexts, plan, params, traced=trace is not None)
        joined = plan is not None and plan.reuse is not None
        before = contexts[0] if contexts and not joined else None
        if before is not None:
            plan = before.plan
        if plan is not None and not contexts:
            plan = plan.without_reuse
        return self._add(
            list(prompt_ids),
            params,
            plan or Plan(),
            request_id,
            trace,
            priority=priority,
            user=user,
            context=before,
            reused=tuple(contexts) if before is None else (),
        )

    def add_context(
        self,
        token_ids: Seq[int],
        plan: Plan | None = None,
        context_id: str | None = None,
        *,
        priority: int = 0,
        user: str = "",
    ) -> str:
        """Have a document computed as a request of its own, and kept until `delete_context`.

        When it is there, the last increment of that name brings an output without tokens, and
        requests may name it. `abort` ends its computation.

        Args:
            token_ids: the document, at least one token.
            plan: how its KV cache lives, for all questions; by default exactly, and so under plans
                that join contexts.
            context_id: a name of the caller's; by default a number.
            priority, user: as of `add_request`.

        Returns:
            Its id.

        Raises:
            RequestError: as `add_request`; or what the plan keeps depends on the question.
            KVMemoryError, PlanError: as `add_request`.
        """
        if plan is None or plan.reuse is not None:
            plan = Plan()
        check_context_plan(plan)
        params = SamplingParams(max_tokens=1)
        return self._add(
            list(token_ids), params, plan, context_id, None, priority=priority, user=user, keep=True
        )

    def delete_context(self, context_id: str) -> None:
        """Forget a context; its pages are freed when no unfinished request goes on from it.

        Raises:
            RequestError: there is none.
        """
        self.contexts.delete(context_id)

    @property
    def context_bytes(self) -> int:
        """Bytes of the pages of all contexts on the device, each counted once."""
        return self.contexts.bytes

    def _add(
        self,
        own_ids: list[int],
        params: SamplingParams,
        plan: Plan,
        request_id: str | None,
        trace: Trace | None,
        *,
        priority: int,
        user: str,
        context: Context | None = None,
        reused: tuple[Context, ...] = (),
        keep: bool = False,
    ) -> str:
        """Check a request, or the making of a context, and queue it."""
        arrival = next(self._arrivals)
        request_id = str(arrival) if request_id is None else request_id
        prompt = [int(token) for token in own_ids]
        before = [context] if context is not None else reused
        if prompt:
            prompt = list(itertools.chain(*(one.tokens for one in before), prompt))
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use by an unfinished request")
        if request_id in self.contexts:
            raise RequestError(f"there is a context {request_id!r} already")
        max_new = self.admission.max_new(prompt, params, plan, len(own_ids), reused)
        request = Request(
            request_id,
            arrival,
            prompt,
            params,
            plan,
            len(prompt) + max_new,
            priority,
            user,
            trace=trace,
            context=context,
            reused=reused,
            makes=Context(request_id, prompt, plan) if keep else None,
        )
        for one in before:
            one.users += 1
        sequence = Sequence(
            request,
            0,
            list(prompt),
            SamplerState(params, prompt, self.model.eos_token_ids, max_new),
            self._new_text(prompt, params),
        )
        request.sequences.append(sequence)
        request.n_reusable = self.prefixes.found(sequence)
        self._requests[request_id] = request
        self.scheduler.add(sequence)
        return request_id

    def expected_wait_s(self, request_id: str) -> float:
        """Seconds until a request that was just added gets its first token; see `wait`."""
        return expected_wait_s(self.scheduler, self._requests[request_id].sequences[0])

    def expected_tokens(self, request_ids: Iterable[str]) -> tuple[int, int]:
        """Prompt tokens to compute and tokens to generate at the most, for showing progress."""
        requests = [self._requests[request_id] for request_id in request_ids]
        prompts = sum(len(request.prompt_ids) for request in requests)
        new = sum((r.max_total - len(r.prompt_ids)) * r.params.n for r in requests)
        return prompts, new

    def abort(self, request_id: str, error: str | None = None) -> list[Increment]:
        """End a request and free its pages at once; what it had so far is in its output.

        Its finish_reason is "abort", or "error" where `error` says why it could not go on.
        Unknown and already ended requests are left alone.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        open_ = [s for s in request.sequences if s.status is not Status.FINISHED]
        reason: FinishReason = "abort" if error is None else "error"
        return [self._finish(sequence, reason, error=error) for sequence in open_]

    @torch.inference_mode()
    def step(self) -> list[Increment]:
        """Run the model once over the work the scheduler chose, and sample.

        Returns:
            What each sequence gained. An empty list does not mean that nothing is left to do
            (see `idle`): a step may compute a part of a prompt only.

        When the model's forward fails, the requests of that step end with finish_reason "error"
        and their pages are freed; the others go on. When a plan's method fails, that is so for its
        own request.
        """
        start = time.perf_counter()
        work, stuck = self.scheduler.schedule()
        increments = [self._finish(s, "error", error=self._stuck_message(s)) for s in stuck]
        increments += self._keep_contexts()
        if work:
            n_decoding = sum(not item.sequence.in_prompt for item in work)
            n_prompt = sum(item.n_tokens for item in work if item.sequence.in_prompt)
            n_recorded = self._n_recorded
            try:
                outcomes, failed = self._forward(work)
            except Exception as error:
                _log.exception("a step of %d sequences failed", len(work))
                outcomes, failed = [], [(item.sequence, error) for item in work]
            for sequence, reason in failed:
                message = f"{type(reason).__name__}: {reason}"
                increments.append(self._finish(sequence, "error", error=message))
            increments += self._extend(outcomes)
            if not failed and n_recorded == self._n_recorded:  # to record a step takes long, once
                seconds = time.perf_counter() - start
                self.scheduler.costs.observe(seconds, n_decoding, n_prompt)
        elif not increments and not self.idle:
            raise RuntimeError("no sequence can run, and none is stuck: a bug in the scheduler")
        self.stats.steps += 1
        self.stats.step_s += time.perf_counter() - start
        return increments

    # --- one step -------------------------------------------------------------------------------

    def _forward(
        self, work: list[Work]
    ) -> tuple[list[tuple[Sequence, torch.Tensor]], list[tuple[Sequence, Exception]]]:
        """Run the model; what it says after the last token of each sequence that reached it.

        Returns:
            Sequences with their logits, fp32 [1, vocab]; with a draft, those after each of its
            tokens too, [1 + drafted, vocab]. And sequences whose plan failed, with the reason.
        """
        now = time.perf_counter()
        sequences = [item.sequence for item in work]
        requests = {sequence.request for sequence in sequences}
        for request in requests:
            request.started_s = request.started_s or now
        for item in work:
            self._watch(item.sequence)
        flat = FlatBatch.of(work, self.model)
        began = time.perf_counter()
        left = None
        logits = None if self.graphs is None else self.graphs.logits(sequences, flat)
        if logits is None:
            logits, left = self._run(work, flat)
        self.stats.forward_s += time.perf_counter() - began
        at = 0
        failed: dict[Sequence, Exception] = {}
        for sequence, n in work:
            leaving = None
            if left is not None and sequence.program is not None and not sequence.program.whole:
                leaving = left[at : at + n]
                at += n
            try:
                self._advance(sequence, n, leaving)
            except Exception as error:
                _log.exception("the plan %s failed", sequence.request.plan)
                failed[sequence] = error
        n_sampled = len(flat.sample_at)
        if flat.scored:
            flat.score(logits[n_sampled:])
        outcomes = [
            (sequence, logits[rows.start : rows.stop])
            for sequence, rows in flat.sampled
            if sequence not in failed
        ]
        return outcomes, list(failed.items())

    @property
    def _n_recorded(self) -> int:
        """Decode steps that were recorded so far."""
        return 0 if self.graphs is None else self.graphs.recorded

    def _run(self, work: list[Work], flat: FlatBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model on any work.

        Returns:
            Logits of the rows `sample_at` and `score_at`, fp32 [m, vocab]; and the hidden states of
            rows that leave before the last layer, where `flat.rows` says that some do.
        """
        device = self.cache.arena.data.device
        position = torch.tensor(flat.positions, dtype=torch.int32, device=device)
        batch = StepBatch(self.cache, [_member(item) for item in work], position)
        inputs = (
            torch.tensor(flat.tokens, device=device),
            position.long(),
            torch.tensor(flat.sample_at + flat.score_at, dtype=torch.long, device=device),
        )
        rope = torch.tensor(flat.rope_lengths, device=device) if self.model.dynamic_rope else None
        lives = [item.sequence.life for item in work]
        similar = any(
            life is not None and life.plan.needs.similarity and not life.generating
            for life in lives
        )
        measure = batch.measure if similar else None
        rows = flat.rows
        if rows is None:
            return self.model.forward(*inputs, batch.attend, rope, measure=measure), None
        return self.model.forward(*inputs, batch.attend, rope, rows=rows, measure=measure)

    def _watch(self, sequence: Sequence) -> None:
        """Begin the passes of a generated token where its plan has some, and see that what a pass
        observes is noted."""
        life, tokens = sequence.life, sequence.request.plan.tokens
        if life is None or tokens is None:
            return
        if sequence.program is None and not sequence.in_prompt and tokens.steps:
            held = [of_layer.sort().values for of_layer in life.aside.held]
            passes = tokens.step(sequence.n_computed, held, self.shape)
            if passes is not None:
                sequence.program = Program(passes, life, self.shape.n_layers)
        if sequence.program is not None:
            current = sequence.program.current
            life.watch = (current.layers[-1], current.observe) if current.observe else None
            life.sees = current.sees

    def _advance(self, sequence: Sequence, n: int, left: torch.Tensor | None) -> None:
        """Count `n` tokens that a sequence ran, and let its plan act on them."""
        cache, life, program = sequence.cache, sequence.life, sequence.program
        assert cache is not None
        if life is not None and life.failure is not None:
            raise life.failure
        cache.advance(0 if sequence.in_place else n, sequence.layers)
        if program is not None:
            program.advance(n, left, self.model.keys_values)
        self._measure(sequence.request)
        if sequence.draft is not None:
            return  # how many of them stay is known when they have been sampled
        if program is None:
            self._settle(sequence, n)
            return
        assert life is not None
        life.count_attention(n)
        program.turn()
        if program.finished:
            sequence.program, life.watch, life.sees, life.fresh = None, None, None, None
            tokens = sequence.request.plan.tokens
            if tokens is None or not tokens.steps:
                life.aside.forget_waiting()
            n_done = sequence.n_prompt - sequence.n_computed if sequence.in_prompt else 1
            life.position_shift = sequence.n_computed + n_done - cache.next_position
            self._settle(sequence, n_done)

    def _settle(self, sequence: Sequence, n: int) -> None:
        """Count `n` tokens as computed, and let the plan act on them."""
        assert sequence.cache is not None
        if sequence.in_prompt:
            self.stats.prefill_tokens += n
        else:
            self.stats.decode_tokens += n
        self.scheduler.order.served(sequence, n)
        sequence.n_computed += n
        if sequence.life is not None:
            sequence.life.count_attention(n)
        self.prefixes.note_computed(sequence)
        tokens = sequence.request.plan.tokens
        if tokens is None or not tokens.steps:  # those that bring tokens back need all of them
            sequence.cache.trim()
        if sequence.life is not None and sequence.in_question:
            sequence.life.pass_over(n)
        elif sequence.life is not None:
            sequence.life.settle(n)
            self.prefixes.note_settled(sequence)

    def _extend(self, outcomes: Seq[tuple[Sequence, torch.Tensor]]) -> list[Increment]:
        """Sample for every sequence whose last token was computed; fork after the prompt."""
        increments = []
        rows: list[torch.Tensor] = []
        sequences: list[Sequence] = []
        for sequence, logits in outcomes:
            if sequence.draft is not None:
                increments += self._verify(sequence, logits)
            elif sequence.n_pending == 0 and sequence.request.makes is None:
                self._learn(sequence, torch.tensor(sequence.tokens[-1:]), logits)
                branches = self._branches(sequence)
                rows += [logits] * len(branches)
                sequences += branches
        increments += self._keep_contexts()
        if not sequences:
            return increments
        sampled = sample(torch.cat(rows), [sequence.sampler for sequence in sequences])
        now = time.perf_counter()
        pushed = [self._push(s, token, now) for s, token in zip(sequences, sampled, strict=True)]
        return increments + pushed

    def _keep_contexts(self) -> list[Increment]:
        """Keep the contexts whose tokens have been computed and settled."""
        increments = []
        for sequence in list(self.scheduler.running):
            request = sequence.request
            if request.makes is not None and sequence.n_pending == 0 and sequence.settled:
                self._measure(request)
                request.first_token_s = time.perf_counter()
                self.contexts.keep(request.makes, sequence)
                increments.append(self._finish(sequence, "stop"))
        return increments

    def _verify(self, sequence: Sequence, logits: torch.Tensor) -> list[Increment]:
        """Sample along a draft tree as far as it is right, and keep what was right of it.

        Every token is sampled as it would be without a draft, after the tokens before it.
        """
        tree, cache = sequence.draft, sequence.cache
        assert tree is not None
        assert cache is not None
        increments: list[Increment] = []
        now = time.perf_counter()

        def next_token(row: int) -> int:
            token = sample(logits[row : row + 1], [sequence.sampler])[0]
            increments.append(self._push(sequence, token, now))
            return token.token_id if sequence.cache is not None else -1  # -1: it has ended

        given = torch.cat([torch.tensor(sequence.tokens[-1:]), tree.tokens])
        self._learn(sequence, given, logits)
        sequence.draft = None
        rows = drafts.accept(tree, next_token)
        self.stats.drafted += len(tree.tokens)
        self.stats.accepted += len(rows) - 1
        if sequence.cache is not None:
            cache.retract(1 + len(tree.tokens), rows)
            self._settle(sequence, len(rows))
        return increments

    def _learn(self, sequence: Sequence, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Let the plan's drafting method see what the model says after some tokens [m]: logits
        [m, vocab]."""
        draft = sequence.request.plan.draft
        if draft is not None:
            draft.learn(self.scheduler.learned(draft), tokens, logits)

    def _branches(self, first: Sequence) -> list[Sequence]:
        """The sequence itself, or all `n` of its request when its prompt was just computed."""
        request = first.request
        n = request.params.n
        if len(request.sequences) == n:
            return [first]
        assert first.cache is not None
        forks = []
        for index in range(1, n):
            cache = first.cache.fork()
            fork = Sequence(
                request,
                index,
                list(first.tokens),
                first.sampler.fork(index),
                self._new_text(request.prompt_ids, request.params),
                cache=cache,
                life=None if first.life is None else first.life.fork(cache),
                prefix=first.prefix,
                n_computed=first.n_computed,
            )
            forks.append(fork)
        request.sequences += forks
        self.scheduler.add_forks(forks)
        return [first, *forks]

    def _push(self, sequence: Sequence, sampled: Sampled, now: float) -> Increment:
        """Append a sampled token and end the sequence where it must end."""
        request, params = sequence.request, sequence.request.params
        if not sampled.finite:
            return self._finish(
                sequence, "error", error="the model's logits are not finite (NaN or infinity)"
            )
        token = sampled.token_id
        sequence.tokens.append(token)
        sequence.sampler.observe(token)
        request.first_token_s = request.first_token_s or now
        request.last_token_s = now
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            logprobs = (as_logprob(sampled),)
            sequence.logprobs += logprobs
        ends = sequence.n_output >= params.min_tokens and token in sequence.sampler.stop_ids
        text = ""
        if sequence.text is not None and (not ends or params.include_stop):
            text = sequence.text.push(token)
        reason: FinishReason | None = None
        if ends:
            reason, sequence.stop_reason = "stop", token
        elif sequence.text is not None and sequence.text.stopped:
            reason, sequence.stop_reason = "stop", sequence.text.stop_reason
        elif sequence.sampler.complete:
            reason = "stop"
        elif len(sequence.tokens) >= request.max_total:
            reason = "length"
        if reason is not None:
            return self._finish(sequence, reason, text, (token,), logprobs)
        if len(sequence.tokens) - 1 == self.model.switch_length:
            self.scheduler.restart(sequence)
        return Increment(request.id, sequence.index, text, (token,), logprobs)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> Increment:
        """End a sequence, free its pages, and end the request with its last sequence."""
        request = sequence.request
        if request.trace is not None and sequence.index == 0 and sequence.life is not None:
            inspection.finish(request.trace, sequence.life)
        if sequence.text is not None:
            text += sequence.text.flush()
        sequence.finish_reason, sequence.error = reason, error
        self._measure(request)
        self.scheduler.remove(sequence)
        output = None
        if request.finished:
            del self._requests[request.id]
            for context in request.reused or filter(None, [request.context]):
                self.contexts.leave(context)
            self.stats.preemptions += request.preemptions
            longest = len(request.prompt_ids) + max(0, request.n_longest - 1)
            output = request.output(self.layout.bytes_for(longest))
        return Increment(
            request.id,
            sequence.index,
            text,
            token_ids,
            logprobs,
            reason,
            sequence.stop_reason,
            error,
            output,
        )

    def _stuck_message(self, sequence: Sequence) -> str:
        return (
            f"the KV memory of {format_bytes(self.cache.capacity_bytes)} is exhausted after "
            f"{sequence.n_computed} tokens with nothing else left to evict"
        )

    def _new_text(self, prompt: Seq[int], params: SamplingParams) -> TextStream | None:
        if self.model.tokenizer is None:
            return None
        return TextStream(
            self.model.tokenizer,
            params.stop,
            params.include_stop,
            min_tokens=params.min_tokens,
            context=prompt[-_TEXT_CONTEXT:],
        )

    def _measure(self, request: Request) -> None:
        """Keep the bytes of the request's pages and waiting hidden states, and their peak; what its
        branches share counts once."""
        caches = [s.cache for s in request.sequences if s.cache is not None]
        if caches:
            lives = [s.life for s in request.sequences if s.life is not None]
            waiting = {id(hidden): hidden for life in lives for hidden in life.aside.waiting}
            request.kv_bytes = self.cache.distinct_bytes(caches)
            request.kv_bytes += sum(hidden.nbytes for hidden in waiting.values())
            request.kv_bytes_peak = max(request.kv_bytes_peak, request.kv_bytes)


def _shape(model: Model) -> ModelShape:
    """What methods may know of a model."""
    layers = tuple(
        MethodLayerShape(spec.q_heads, spec.kv_heads, spec.k_dim, spec.v_dim, spec.window)
        for spec in model.layers
    )
    return ModelShape(layers, model.vocab_size, model.dtype, model.directory)


def _member(item: Work) -> Member:
    """A sequence of a step as its attention takes it."""
    sequence = item.sequence
    assert sequence.cache is not None
    tree = None if sequence.draft is None else drafts.visible(sequence.draft)
    return Member(sequence.cache, item.n_tokens, sequence.life, tree, sequence.layers)
