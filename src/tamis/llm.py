"""The public API for scripts: `LLM`, a thin shell around an `Engine`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tamis.engine.engine import Engine
from tamis.engine.graphs import capture_for
from tamis.engine.order import Order
from tamis.engine.outputs import Increment, RequestOutput
from tamis.engine.pace import Pace
from tamis.engine.scheduler import Preemption
from tamis.engine.trace import Trace
from tamis.errors import ConfigError, RequestError
from tamis.guide import JsonGuide, Vocabulary
from tamis.inspection import Inspection
from tamis.inspection.assemble import assemble
from tamis.methods.base import Method
from tamis.model import Model, load_model
from tamis.plan import Plan
from tamis.platform import available_memory, format_bytes, parse_bytes
from tamis.sampling import SamplingParams

Prompt = str | Seq[int]


class LLM:
    """A model, its KV memory, and an engine that runs any number of requests over them.

    Args:
        model: a directory in 🤗 format, a hub name, or an already loaded `Model`.
        plan: the plan of requests that bring none.
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is bfloat16 where the hardware
            multiplies it, else float32.
        device: "auto", "cpu" or "cuda".
        weights: "int8" or "int4" keeps the weights of the linear layers of a model that is loaded
            here in so many bits (`tamis.model.quantized`); None keeps them in `dtype`.
        kv_memory: memory for KV pages, such as "4GiB", or bytes.
        max_batch_tokens: the most tokens of one step; long prompts are computed in chunks of it.
        page_size: tokens per page of one KV head.
        max_running: the most sequences that run at once.
        preemption: what becomes of a request's pages when they are needed by an older request:
            "recompute" (forget them) or "swap" (move them to host memory).
        swap_memory: host memory for "swap"; by default as much as `kv_memory`.
        host_memory: host memory for plans that place pages there; by default as much as
            `kv_memory`. The system commits it only when it is used; for a GPU, all of it then.
        prefix_cache: whether prompts begin with the KV pages that earlier ones computed for the
            same tokens, which are kept until somebody needs their room. Off unless asked for, so
            that a prompt that is measured twice is computed twice; servers switch it on.
        order: who goes first; by default who came first.
        pace: how many prompt tokens join a step in which other requests decode; by default as many
            as fit, which is fastest for all of them together.
        cuda_graphs: whether decode steps are recorded in CUDA graphs, one per size, when they first
            come up (`tamis.engine.graphs`); None is yes on a CUDA device. On a CPU, where there are
            no graphs, True runs the same code and gains nothing.
        trust_remote_code: whether a model directory may bring its own code.

    Raises:
        ConfigError: a setting is wrong. ModelError: the model cannot be loaded.
        UnsupportedModelError: its architecture cannot run. PlanError: the plan is wrong.
        KVMemoryError: `kv_memory` is too small to hold anything.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        plan: str | Plan = "dense",
        dtype: str = "auto",
        device: str = "auto",
        weights: str | None = None,
        kv_memory: str | int = "4GiB",
        max_batch_tokens: int = 2048,
        page_size: int = 64,
        max_running: int = 256,
        preemption: Preemption = "recompute",
        swap_memory: str | int | None = None,
        host_memory: str | int | None = None,
        prefix_cache: bool = False,
        order: Order | None = None,
        pace: Pace | None = None,
        cuda_graphs: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.plan = Plan.parse(plan)
        kv_bytes = parse_bytes(kv_memory)
        swap_bytes = 0
        if preemption == "swap":
            swap_bytes = kv_bytes if swap_memory is None else parse_bytes(swap_memory)
        if not isinstance(model, Model):
            model = load_model(
                model,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                weights=weights,
            )
        elif weights is not None:
            raise ConfigError(
                f"weights {weights!r} were asked for, but the model is loaded already; give "
                "load_model the weights, or LLM the model's directory"
            )
        self.model = model
        free = available_memory(model.device)
        if kv_bytes > free:
            raise ConfigError(
                f"kv_memory of {format_bytes(kv_bytes)} is more than the {format_bytes(free)} "
                f"that {model.device} has free"
            )
        self.engine = Engine(
            model,
            kv_bytes=kv_bytes,
            max_batch_tokens=max_batch_tokens,
            page_size=page_size,
            max_running=max_running,
            preemption=preemption,
            swap_bytes=swap_bytes,
            host_bytes=kv_bytes if host_memory is None else parse_bytes(host_memory),
            prefix_cache=prefix_cache,
            order=order,
            pace=pace,
            capture=capture_for(model.device, cuda_graphs),
        )
        self._inboxes: dict[str, list[Increment]] = {}

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens as bytes; made when it is first asked for.

        Raises:
            RequestError: the model directory has no tokenizer. ConfigError: the grammar library is
            not installed.
        """
        model = self.model
        if model.tokenizer is None:
            raise RequestError("this model directory has no tokenizer, so its tokens have no text")
        return Vocabulary(model.tokenizer, model.vocab_size, model.eos_token_ids)

    def json_guide(self, schema: Mapping[str, Any] | None = None) -> JsonGuide:
        """What makes an output JSON that fits a schema; give it to `SamplingParams(guide=...)`.

        Args:
            schema: a JSON schema; None is any object.

        Raises:
            RequestError: the schema is not one, or asks for what cannot be guided; or there is no
            tokenizer. ConfigError: the grammar library is not installed.
        """
        return JsonGuide(self.vocabulary, schema)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's tokenizer knows how to write a conversation."""
        return bool(getattr(self.model.tokenizer, "chat_template", None))

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """The token ids of a text prompt, with the tokenizer's own special tokens if it `begins`
        the sequence.

        Raises:
            RequestError: the model directory has no tokenizer.
        """
        if self.model.tokenizer is None:
            raise RequestError(
                "this model directory has no tokenizer; give the prompt as token ids"
            )
        return list(self.model.tokenizer(text, add_special_tokens=begins)["input_ids"])

    def encode_chat(self, messages: Seq[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the model's answer.

        Args:
            messages: `{"role": ..., "content": ...}` each.

        Raises:
            RequestError: the tokenizer is missing or has no chat template, or that refuses the
            conversation.
        """
        tokenizer = self.model.tokenizer
        if tokenizer is None or not self.has_chat_template:
            raise RequestError("this model has no chat template; give the prompt as plain text")
        if not messages:
            raise RequestError("the conversation is empty; give at least one message")
        try:
            encoded = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise RequestError(
                f"the model's chat template refuses this conversation: {error}"
            ) from error
        return list(encoded["input_ids"])

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        plan: str | Plan | Seq[str | Plan] | None = None,
        *,
        context: str | Seq[str] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Run prompts as one batch to their ends.

        Args:
            prompts: one text, one list of token ids, or a list of either.
            params: for all prompts, or one per prompt.
            plan: for all prompts, or one per prompt; None is the `LLM`'s own, or the context's.
            context: the id of a context (`add_context`) that all prompts go on from, or the ids of
                several that come before each prompt one after the other, under a plan that says
                how.
            progress: whether to show a progress bar on standard error; None shows one on a
                terminal.

        Returns:
            One output per prompt, in order. A request that failed while running has
            finish_reason "error" and says why in `error`.

        Raises:
            RequestError, KVMemoryError, PlanError: a prompt cannot be run. Nothing was run then.
            KeyboardInterrupt: Ctrl-C; the pages of all prompts have been freed.
        """
        batch = _as_prompts(prompts)
        all_params = _per_prompt(params or SamplingParams(), SamplingParams, len(batch), "params")
        own = self.plan_after(context) if plan is None else plan
        plans = _per_prompt(own, (str, Plan, Method), len(batch), "plans")
        ids: list[str] = []
        try:
            for prompt, one, its_plan in zip(batch, all_params, plans, strict=True):
                ids.append(self._add(prompt, one, Plan.parse(its_plan), context=context))
            show = sys.stderr.isatty() if progress is None else progress
            with _Progress(self.engine, ids, show) as bar:
                return [self._finish(request_id, bar) for request_id in ids]
        finally:
            for request_id in ids:
                self._drop(request_id)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        plan: str | Plan | None = None,
        *,
        context: str | Seq[str] | None = None,
    ) -> Iterator[Increment]:
        """Run one prompt and yield what each step adds; closing the iterator frees its pages.

        The last increment carries the whole `RequestOutput` in `output`.

        Raises:
            As `generate`, when the first increment is asked for.
        """
        its_plan = Plan.parse(self.plan_after(context) if plan is None else plan)
        request_id = self._add(prompt, params or SamplingParams(), its_plan, context=context)
        try:
            finished = False
            while not finished:
                for increment in self._next(request_id):
                    finished = increment.output is not None
                    yield increment
        finally:
            self._drop(request_id)

    def add_context(self, document: Prompt, plan: str | Plan | None = None) -> str:
        """Compute a document once, for any number of `generate(..., context=id)`.

            book = llm.add_context(text, "kivi(bits=4)")
            llm.generate(["Who did it?", "Where?"], context=book)

        Args:
            document: a text or a list of token ids, which prompts go on from.
            plan: how its KV lives, and that of the prompts; None is the `LLM`'s own.

        Returns:
            Its id. Its pages are kept until `delete_context`.

        Raises:
            RequestError: what the plan keeps depends on the question, or the computation failed.
            KVMemoryError, PlanError: as `generate`.
        """
        its_plan = self.plan if plan is None else Plan.parse(plan)
        tokens = self.encode(document) if isinstance(document, str) else document
        context_id = self.engine.add_context(tokens, its_plan)
        self._inboxes[context_id] = []
        try:
            with _Progress(self.engine, [context_id], sys.stderr.isatty()) as bar:
                output = self._finish(context_id, bar)
        finally:
            self._drop(context_id)
        if output.error is not None:
            raise RequestError(f"the context failed: {output.error}")
        return context_id

    def delete_context(self, context_id: str) -> None:
        """Free a context's pages.

        Raises:
            RequestError: there is none of this id.
        """
        self.engine.delete_context(context_id)

    def inspect(
        self, prompt: Prompt, plan: str | Plan | None = None, params: SamplingParams | None = None
    ) -> Inspection:
        """Run one prompt to its end, and see what the plan did: which tokens each layer and KV
        head kept, in how many bytes, and what was computed and read.

            llm.inspect(prompt, "snapkv(budget=0.1)").to_html("page.html", highlight="the answer")

        Args:
            prompt: a text or a list of token ids.
            plan: None is the `LLM`'s own.
            params: of one completion.

        Raises:
            RequestError: `params.n` is not 1, or the request failed. And as `generate`.
        """
        params, its_plan = params or SamplingParams(), self.plan if plan is None else plan
        if params.n != 1:
            raise RequestError(f"an inspection follows one completion; n={params.n} must be 1")
        its_plan, trace = Plan.parse(its_plan), Trace()
        request_id = self._add(prompt, params, its_plan, trace)
        try:
            with _Progress(self.engine, [request_id], sys.stderr.isatty()) as bar:
                output = self._finish(request_id, bar)
        finally:
            self._drop(request_id)
        if output.error is not None:
            raise RequestError(f"the request failed: {output.error}")
        return assemble(self.model, self.engine.layout.page_size, its_plan, trace, output)

    def plan_after(self, context: str | Seq[str] | None) -> Plan:
        """The plan of requests that bring none: a single context's, else the `LLM`'s own.

        Raises:
            RequestError: there is no context of this id.
        """
        names = [context] if isinstance(context, str) else list(context or ())
        return self.engine.contexts.find(names[0]).plan if len(names) == 1 else self.plan

    def _add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        plan: Plan,
        trace: Trace | None = None,
        context: str | Seq[str] | None = None,
    ) -> str:
        tokens = self.encode(prompt, begins=not context) if isinstance(prompt, str) else prompt
        request_id = self.engine.add_request(tokens, params, plan, trace=trace, context=context)
        self._inboxes[request_id] = []
        return request_id

    def _drop(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self._inboxes.pop(request_id, None)

    def _next(self, request_id: str) -> list[Increment]:
        """The increments of one request since the last call, after a step if there are none yet.

        Steps run for all open requests at once, so what others gain waits in their inboxes.
        """
        if not self._inboxes[request_id]:
            for increment in self.engine.step():
                if increment.request_id in self._inboxes:
                    self._inboxes[increment.request_id].append(increment)
        increments, self._inboxes[request_id] = self._inboxes[request_id], []
        return increments

    def _finish(self, request_id: str, bar: _Progress) -> RequestOutput:
        while True:
            for increment in self._next(request_id):
                if increment.output is not None:
                    return increment.output
            bar.update()


class _Progress:
    """Two bars on standard error: prompt tokens computed, tokens generated."""

    def __init__(self, engine: Engine, request_ids: Seq[str], show: bool) -> None:
        self._stats = engine.stats
        self._start = (engine.stats.prefill_tokens, engine.stats.decode_tokens)
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=console.is_terminal,  # a log keeps the final state
            disable=not show,
        )
        prompt_tokens, new_tokens = engine.expected_tokens(request_ids)
        self._prefill = self._bars.add_task("prefill", total=prompt_tokens)
        self._decode = self._bars.add_task("decode", total=new_tokens)

    def update(self) -> None:
        prefill, decode = self._start
        self._bars.update(self._prefill, completed=self._stats.prefill_tokens - prefill)
        self._bars.update(self._decode, completed=self._stats.decode_tokens - decode)

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()


def _as_prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list of many."""
    if isinstance(prompts, str):
        return [prompts]
    many = list(prompts)
    if many and not isinstance(many[0], str | Seq):
        return [many]  # type: ignore[list-item]
    return many  # type: ignore[return-value]


def _per_prompt(value: Any, kinds: Any, n: int, what: str) -> list[Any]:
    """`value` for each of `n` prompts: repeated where it is one, checked where it is a list."""
    if isinstance(value, kinds):
        return [value] * n
    values = list(value)
    if len(values) != n:
        raise RequestError(f"{len(values)} {what} for {n} prompts; give one, or one per prompt")
    return values
