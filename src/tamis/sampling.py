"""What a request asks of its output: how tokens are chosen, when to stop, what to return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from tamis.errors import RequestError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by less leaves only the largest anyway."""


class GuidedOutput(Protocol):
    """One output that is being generated under a `Guide`."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow any more."""

    def allowed(self, remaining: int) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, bool [vocab], when `remaining` are left, this one among
        them."""

    def vet(self, token_id: int, remaining: int) -> int:
        """An allowed token itself, or the one that must be taken in its place."""

    def observe(self, token_id: int) -> None:
        """Go on after a token that was added to the output."""

    def fork(self) -> GuidedOutput:
        """A second output that begins as this one did so far."""


class Guide(Protocol):
    """What an output must be, for example JSON that fits a schema (`LLM.json_guide`)."""

    @property
    def least_tokens(self) -> int:
        """Tokens that suffice for an output."""

    def start(self) -> GuidedOutput:
        """The beginning of an output."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of one request; the defaults decode greedily.

    A wrong value raises `RequestError` at construction. Sequences and the mapping are copied, and
    a plain string for `stop` stands for one stop string.

    Attributes:
        max_tokens: tokens to generate at most, ≥ 1; None goes on until the model's context or
            the KV memory ends.
        min_tokens: before this many tokens are out, end-of-sequence and stop ids cannot be chosen
            and stop strings do not stop.
        temperature: 0 (default; so is anything below 1e-5) takes the most probable token, which
            reproduces an exact engine's reference; otherwise logits are divided by it, up to 100.
        top_k: sample among the k most probable tokens (ties with the k-th stay); None: among all.
        top_p: sample among the fewest most probable tokens whose probabilities sum to `top_p`,
            in (0, 1].
        min_p: drop tokens less probable than `min_p` times the most probable one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of every token seen in
            the prompt or the output, as in 🤗 Transformers; in [0.01, 100], 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens seen in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        stop: strings that end the output, wherever token boundaries fall in them.
        stop_token_ids: token ids that end the output, beside the model's end-of-sequence ids.
        ignore_eos: treat the model's end-of-sequence ids as ordinary tokens.
        include_stop: leave the stop string that ended the output at the end of the text.
        seed: of this request's own random stream; None draws one from the operating system.
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        logprobs: None returns none; k ≥ 0 returns the log-probability of each chosen token and
            of the k most probable ones, under the model's own distribution: before penalties,
            bias, temperature and truncation.
        prompt_logprobs: the same for the tokens of the prompt, each under the tokens before it.
        n: how many outputs to generate from the prompt, ≥ 1.
        guide: what the output must be; it then ends where that is complete, within `max_tokens`.
        forced: the output itself, token ids that are taken whatever the model would choose. It is
            then as long as these (`max_tokens`, `ignore_eos` follow), and with `logprobs` it is
            scored as the plan's generation would have it: one step per token, on a cache that the
            plan evicts from, encodes and reads as ever. Token ids; none force nothing.
    """

    max_tokens: int | None = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    guide: Guide | None = None
    forced: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._set("forced", _token_ids("forced", self.forced))
        if self.forced:
            self._set("max_tokens", len(self.forced))
            self._set("ignore_eos", True)
        self._set("max_tokens", _optional_integer("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}; "
                "it must not exceed it"
            )
        self._set("temperature", _number("temperature", self.temperature, 0, 100))
        self._set("top_k", _optional_integer("top_k", self.top_k, 1))
        self._set("top_p", _number("top_p", self.top_p, 0, 1, above_low=True))
        self._set("min_p", _number("min_p", self.min_p, 0, 1))
        self._set(
            "repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        )
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, _number(name, getattr(self, name), -2, 2))
        self._set("stop", _strings(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        for name in ("ignore_eos", "include_stop"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        self._set("seed", _optional_integer("seed", self.seed, None))
        self._set("logit_bias", _bias(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            self._set(name, _optional_integer(name, getattr(self, name), 0))
        self._set("n", _integer("n", self.n, 1))
        if self.guide is not None and self.min_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, but a guide says itself where the output ends; "
                "leave min_tokens at 0"
            )

        for name in ("guide", "stop", "stop_token_ids"):
            if self.forced and getattr(self, name):
                raise RequestError(f"{name} and forced both say what the output is; give one")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, with no draw."""
        return self.temperature < GREEDY_BELOW

    @property
    def least_tokens(self) -> int:
        """Tokens that an output that is as asked may take."""
        return len(self.forced) if self.guide is None else self.guide.least_tokens

    def validate_for(self, vocab_size: int) -> None:
        """Check what only a model can tell.

        Args:
            vocab_size: number of logits the model returns.

        Raises:
            RequestError: a token id in `stop_token_ids`, `forced` or `logit_bias` is not in the
                vocabulary, or `logprobs` or `prompt_logprobs` asks for more tokens than it has.
        """
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("forced", self.forced),
            ("logit_bias", self.logit_bias or {}),
        ):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise RequestError(
                        f"{name} names token {token_id}; this model's token ids are "
                        f"0 to {vocab_size - 1}"
                    )
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            if wanted is not None and wanted > vocab_size:
                raise RequestError(f"{name} is {wanted}; this model has only {vocab_size} tokens")


def _integer(name: str, value: object, low: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} is {value!r}; it must be an integer{_at_least(low)}")
    if low is not None and value < low:
        raise RequestError(f"{name} is {value}; it must be{_at_least(low)}")
    return int(value)


def _at_least(low: int | None) -> str:
    return "" if low is None else f" at least {low}"


def _optional_integer(name: str, value: object, low: int | None) -> int | None:
    return None if value is None else _integer(name, value, low)


def _number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> float:
    bounds = f"greater than {low} and at most {high}" if above_low else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} is {value!r}; it must be a number {bounds}")
    number = cast(float, value)
    if not low <= number <= high or (above_low and number == low):
        raise RequestError(f"{name} is {number}; it must be {bounds}")
    return float(number)


def _strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Iterable):
        raise RequestError(f"stop is {stop!r}; it must be a string or a sequence of strings")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"stop contains {string!r}; stop strings must be non-empty strings")
    return strings


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    if not isinstance(ids, Iterable) or isinstance(ids, str):
        raise RequestError(f"{name} is {ids!r}; it must be a sequence of token ids")
    return tuple(_integer(f"a token id in {name}", token_id, 0) for token_id in ids)


def _bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias is {bias!r}; it must map token ids to numbers")
    return {
        _integer("a token id in logit_bias", token_id, 0): _number(
            f"logit_bias of token {token_id}", value, -100, 100
        )
        for token_id, value in bias.items()
    }
