"""The engine: requests in, increments out, one `step()` at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from tamis.cache import BatchView, CacheLayout, LayerShape, PagedCache
from tamis.engine.attend import StepAttention
from tamis.engine.flat import FlatBatch, as_logprob
from tamis.engine.outputs import FinishReason, Increment, TokenLogprob
from tamis.engine.sampler import Sampled, SamplerState, sample
from tamis.engine.scheduler import Preemption, Scheduler, Work
from tamis.engine.sequence import Request, Sequence, Status
from tamis.engine.text import TextStream
from tamis.errors import ConfigError, KVMemoryError, RequestError
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
    """

    steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0


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
        self.cache = PagedCache(self.layout, kv_bytes, model.device, swap_bytes)
        if not self.cache.fits(1):
            least = format_bytes(self.cache.required_bytes(1))
            raise KVMemoryError(
                f"kv_memory of {format_bytes(kv_bytes)} holds no page for every KV head of this "
                f"model; the least is {least}, for {page_size} tokens"
            )
        self.scheduler = Scheduler(self.cache, max_batch_tokens, max_running, preemption)
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
    ) -> str:
        """Take a request in; its work begins with the next `step()`.

        Args:
            prompt_ids: token ids, at least one.
            params: what to generate.
            plan: how its KV cache lives.
            request_id: a name of the caller's; by default a number.

        Returns:
            The request's id.

        Raises:
            RequestError: empty or too long prompt, token ids out of the vocabulary, stop strings
                without a tokenizer, `n` larger than `max_running`, an id already in use.
            KVMemoryError: the cache could not hold this request even alone.
        """
        arrival = next(self._arrivals)
        request_id = str(arrival) if request_id is None else request_id
        prompt = [int(token) for token in prompt_ids]
        self._check(request_id, prompt, params)
        room = self.model.max_length - len(prompt)
        max_new = room if params.max_tokens is None else min(params.max_tokens, room)
        self._check_memory(len(prompt), max_new)
        request = Request(
            request_id, arrival, prompt, params, plan or Plan(), len(prompt) + max_new
        )
        sequence = Sequence(
            request,
            0,
            list(prompt),
            SamplerState(params, prompt_ids=prompt, eos_token_ids=self.model.eos_token_ids),
            self._new_text(prompt, params),
        )
        request.sequences.append(sequence)
        self._requests[request_id] = request
        self.scheduler.add(sequence)
        return request_id

    def expected_tokens(self, request_ids: Iterable[str]) -> tuple[int, int]:
        """Prompt tokens to compute and tokens to generate at the most, for showing progress."""
        requests = [self._requests[request_id] for request_id in request_ids]
        prompts = sum(len(request.prompt_ids) for request in requests)
        new = sum((r.max_total - len(r.prompt_ids)) * r.params.n for r in requests)
        return prompts, new

    def abort(self, request_id: str) -> list[Increment]:
        """End a request and free its pages at once; what it had so far is in its output.

        Unknown and already ended requests are left alone.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        open_ = [s for s in request.sequences if s.status is not Status.FINISHED]
        return [self._finish(sequence, "abort") for sequence in open_]

    @torch.inference_mode()
    def step(self) -> list[Increment]:
        """Run the model once over the work the scheduler chose, and sample.

        Returns:
            What each sequence gained. An empty list does not mean that nothing is left to do
            (see `idle`): a step may compute a part of a prompt only.

        When the model's forward fails, the requests of that step end with finish_reason "error"
        and their pages are freed; the others go on.
        """
        start = time.perf_counter()
        work, stuck = self.scheduler.schedule()
        increments = [self._finish(s, "error", error=self._stuck_message(s)) for s in stuck]
        if work:
            try:
                logits = self._forward(work)
            except Exception as error:
                _log.exception("a step of %d sequences failed", len(work))
                message = f"{type(error).__name__}: {error}"
                increments += [self._finish(w.sequence, "error", error=message) for w in work]
            else:
                increments += self._extend(work, logits)
        elif not stuck and not self.idle:
            raise RuntimeError("no sequence can run, and none is stuck: a bug in the scheduler")
        self.stats.steps += 1
        self.stats.step_s += time.perf_counter() - start
        return increments

    # --- one step -------------------------------------------------------------------------------

    def _forward(self, work: list[Work]) -> torch.Tensor:
        """The model's logits [sequences that reach their last token, vocab], fp32."""
        now = time.perf_counter()
        sequences = [item.sequence for item in work]
        counts = [item.n_tokens for item in work]
        caches = [s.cache for s in sequences if s.cache is not None]
        requests = {sequence.request for sequence in sequences}
        for request in requests:
            request.started_s = request.started_s or now
        flat = FlatBatch.of(work, self.model)
        device = self.cache.arena.data.device
        position = torch.tensor(flat.positions, dtype=torch.int32, device=device)
        view = BatchView(self.cache, caches, counts, position)
        attend = StepAttention(view, counts, position)
        inputs = (
            torch.tensor(flat.tokens, device=device),
            position.long(),
            torch.tensor(flat.sample_at + flat.score_at, dtype=torch.long, device=device),
        )
        rope = torch.tensor(flat.rope_lengths, device=device) if self.model.dynamic_rope else None
        began = time.perf_counter()
        logits = self.model.forward(*inputs, attend, rope)
        self.stats.forward_s += time.perf_counter() - began
        for sequence, cache, n in zip(sequences, caches, counts, strict=True):
            cache.advance(n)
            sequence.n_computed += n
        for request in requests:
            self._measure(request)
        for cache in caches:
            cache.trim()
        decoded = counts.count(1)
        self.stats.decode_tokens += decoded
        self.stats.prefill_tokens += len(flat.tokens) - decoded
        n_sampled = len(flat.sample_at)
        if flat.scored:
            flat.score(logits[n_sampled:])
        return logits[:n_sampled]

    def _extend(self, work: list[Work], logits: torch.Tensor) -> list[Increment]:
        """Sample for every sequence whose last token was computed; fork after the prompt."""
        rows: list[int] = []
        sequences: list[Sequence] = []
        done = [item.sequence for item in work if item.sequence.n_pending == 0]
        for row, sequence in enumerate(done):
            branches = self._branches(sequence)
            rows += [row] * len(branches)
            sequences += branches
        if not sequences:
            return []
        if len(sequences) > len(logits):
            logits = logits[torch.tensor(rows, device=logits.device)]
        sampled = sample(logits, [sequence.sampler for sequence in sequences])
        now = time.perf_counter()
        return [self._push(s, token, now) for s, token in zip(sequences, sampled, strict=True)]

    def _branches(self, first: Sequence) -> list[Sequence]:
        """The sequence itself, or all `n` of its request when its prompt was just computed."""
        request = first.request
        n = request.params.n
        if len(request.sequences) == n:
            return [first]
        assert first.cache is not None
        forks = []
        for index in range(1, n):
            fork = Sequence(
                request,
                index,
                list(first.tokens),
                first.sampler.fork(index),
                self._new_text(request.prompt_ids, request.params),
                cache=first.cache.fork(),
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
        if sequence.text is not None:
            text += sequence.text.flush()
        sequence.finish_reason, sequence.error = reason, error
        self._measure(request)
        self.scheduler.remove(sequence)
        output = None
        if request.finished:
            del self._requests[request.id]
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

    # --- checks, measures -----------------------------------------------------------------------

    def _check(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use by an unfinished request")
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        bad = next((t for t in prompt if not 0 <= t < self.model.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad} is outside the vocabulary of {self.model.vocab_size} tokens"
            )
        if len(prompt) >= self.model.max_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but the model's context is "
                f"{self.model.max_length} tokens, of which one must be left for the answer"
            )
        if params.n > self.scheduler.max_running:
            raise RequestError(
                f"n={params.n} is more than the {self.scheduler.max_running} sequences that may "
                "run at once (max_running, max_batch_tokens)"
            )
        params.validate_for(self.model.vocab_size)
        if params.stop and self.model.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model directory has none")

    def _check_memory(self, n_prompt: int, max_new: int) -> None:
        """Refuse what the cache cannot hold; the last token's KV is never written to it."""
        n_cached = n_prompt + max_new - 1
        if not self.cache.fits(n_cached, chunk=1):
            enough = self.cache.required_bytes(n_cached, chunk=self.scheduler.max_batch_tokens)
            raise KVMemoryError(
                f"a request of {n_prompt} prompt and {max_new} new tokens needs about "
                f"{format_bytes(self.layout.bytes_for(n_cached))} of KV memory, but kv_memory is "
                f"{format_bytes(self.cache.capacity_bytes)}; kv_memory={enough} would do"
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
        """Keep the request's page bytes and their peak; pages shared by its branches count once."""
        caches = [s.cache for s in request.sequences if s.cache is not None]
        if caches:
            request.kv_bytes = self.cache.distinct_bytes(caches)
            request.kv_bytes_peak = max(request.kv_bytes_peak, request.kv_bytes)
