"""The model that EleutherAI's evaluation harness (`lm_eval`) knows as `tamis`.

    tamis lm-eval --model_args pretrained=DIR,plan=dense --tasks hellaswag

Releases of the harness that look for models in other packages (later than 0.4.13) find it by its
entry point: `lm_eval --model tamis` does the same there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tamis.bench.completed import Order, as_completed
from tamis.engine.outputs import RequestOutput, TokenLogprob
from tamis.errors import ConfigError, RequestError
from tamis.llm import LLM
from tamis.sampling import SamplingParams

NAME = "tamis"

_DEFAULT_DEVICE = "cuda:0"  # the harness says so on every machine

_log = logging.getLogger(__name__)

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)

Texts = tuple[str, str] | None
Scored = tuple[Texts, list[int], list[int]]
"""Context and continuation: as texts, which name them in the harness's cache, and as tokens."""


def register() -> None:
    """Make `--model tamis` known to the harness in this process."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{TamisLM.__module__}:{TamisLM.__name__}")


class TamisLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model in tamis, with all requests of the harness in one continuous batch.

    Args:
        pretrained: a directory in 🤗 format, a hub name, or "reference".
        plan: what becomes of the KV cache.
        dtype, device, weights, kv_memory, max_batch_tokens, trust_remote_code: as for `LLM`.
        max_length: tokens of text and answer; by default, and at most, the model's context.
        max_gen_toks: tokens of an answer, where a task does not say.
        batch_size, max_batch_size: what the harness gives every model; batches here follow
            `max_batch_tokens` and `kv_memory` instead.

    Raises:
        ConfigError: a setting is wrong, or the model has no tokenizer. And as `LLM`.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str = "dense",
        dtype: str = "auto",
        device: str = "auto",
        weights: str | None = None,
        kv_memory: str | int = "4GiB",
        max_batch_tokens: int = 2048,
        trust_remote_code: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(
                f"--model_args names {', '.join(sorted(unknown))}; tamis takes pretrained, plan, "
                "dtype, device, weights, kv_memory, max_batch_tokens, trust_remote_code, "
                "max_length and max_gen_toks"
            )
        self.llm = LLM(
            pretrained,
            plan=plan,
            dtype=dtype,
            device="auto" if device == _DEFAULT_DEVICE else device,
            weights=weights,
            kv_memory=kv_memory,
            max_batch_tokens=max_batch_tokens,
            trust_remote_code=trust_remote_code,
        )
        if self.llm.model.tokenizer is None:
            raise ConfigError(f"{pretrained} has no tokenizer; the harness asks in text")
        self.tokenizer: Any = self.llm.model.tokenizer
        self.max_length = min(max_length or self.llm.model.max_length, self.llm.model.max_length)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text that nothing else precedes.

        Raises:
            ConfigError: the tokenizer has neither a token that begins nor one that ends a text.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ConfigError(
            f"{self.llm.model.name} has no token that begins or ends a text, so text without a "
            "context cannot be scored"
        )

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's own text; without a generation prompt, its last message
        is to be gone on with."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; None adds the tokenizer's special tokens, unless `string` begins with them."""
        if add_special_tokens is None:
            begins = self.tokenizer.bos_token
            add_special_tokens = not (begins and string.startswith(begins))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return list(ids) if string else []

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to its stop strings or the end of the model's answer.

        Prompts too long for the context lose their beginning.

        Raises:
            ConfigError: a task asks for a way of sampling that tamis does not know.
            RequestError: a request failed while running.
        """
        orders = (self._answer_order(i, *request.args) for i, request in enumerate(requests))
        answers = [""] * len(requests)
        for i, output in self._run(orders, len(requests), "answers", disable_tqdm):
            answers[i] = output.text
            self.cache_hook.add_partial("generate_until", requests[i].args, output.text)
        return answers

    def _answer_order(self, tag: int, context: str, settings: Mapping[str, Any]) -> Order[int]:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        stop, length = wanted.pop("until"), wanted.pop("max_gen_toks")
        sampled = wanted.pop("do_sample")
        wanted.setdefault("temperature", 1.0 if sampled else 0.0)
        unknown = sorted(wanted.keys() - set(_SAMPLING))
        if unknown:
            raise ConfigError(
                f"the task sets {', '.join(unknown)}; tamis takes until, max_gen_toks, do_sample, "
                f"{', '.join(_SAMPLING)}"
            )
        if length >= self.max_length:
            raise ConfigError(
                f"the task wants answers of {length:,} tokens, and the context is "
                f"{self.max_length:,}; give a smaller max_gen_toks with --gen_kwargs"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        prompt, length = maybe_truncate(prompt, length, self.max_length)
        params = SamplingParams(max_tokens=length, stop=[s for s in stop if s], **wanted)
        return Order(tag, prompt, params, self.llm.plan)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text as a whole.

        Texts longer than the context are scored in windows; each token is scored once, those of
        the last window with as much before them as the context holds.
        """
        windows: list[Scored] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            # A window's last token takes part here, and one more place is left for an answer.
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 2, 1)
            for pair in pairs:
                context, scored = make_disjoint_window(pair)
                windows.append((None, context, scored))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is what greedy decoding says.

        What is too long loses the beginning of its context.

        Raises:
            RequestError: a continuation alone is too long, or a request failed while running.
        """
        orders = (self._scoring_order(i, *request[1:]) for i, request in enumerate(requests))
        found = [(0.0, True)] * len(requests)
        for i, output in self._run(orders, len(requests), "texts", disable_tqdm):
            texts, _, continuation = requests[i]
            assert output.prompt_logprobs is not None
            scored = output.prompt_logprobs[-len(continuation) :] if continuation else []
            found[i] = _sum(scored)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[i])
        return found

    def _scoring_order(self, tag: int, context: list[int], continuation: list[int]) -> Order[int]:
        room = self.max_length - 1  # one place is left for the answer that every request has
        if len(continuation) >= room:
            raise RequestError(
                f"a continuation of {len(continuation):,} tokens cannot be scored after anything "
                f"within the context of {self.max_length:,}"
            )
        tokens = context + continuation
        if len(tokens) > room:
            _log.warning(
                "a context of %d tokens loses its first %d", len(context), len(tokens) - room
            )
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        return Order(tag, tokens[-room:], params, self.llm.plan)

    def _run(
        self, orders: Iterable[Order[int]], count: int, what: str, quiet: bool
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Outputs as they end. Raises RequestError if a request failed."""
        with (
            tqdm(total=count, desc=f"tamis: {what}", disable=quiet) as bar,
            closing(as_completed(self.llm, orders)) as completed,
        ):
            for tag, output in completed:
                if output.finish_reason == "error":
                    raise RequestError(f"a request of the harness failed: {output.error}")
                bar.update()
                yield tag, output


def _sum(scored: Sequence[TokenLogprob | None]) -> tuple[float, bool]:
    """Log-probability of tokens together; whether each was the most likely one at its place."""
    known = [entry for entry in scored if entry is not None]
    total = math.fsum(entry.logprob for entry in known)
    return total, all(entry.token_id == entry.top[0][0] for entry in known)
