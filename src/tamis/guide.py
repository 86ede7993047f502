"""JSON that fits a schema, always: masks over the vocabulary from a grammar library, and an end
that is reached before the tokens run out.

`llguidance` says which tokens may come next. That alone does not make an answer valid, because it
may be cut off at `max_tokens`; so a guide also knows a way to close the text from where it stands,
and takes it while there are still enough tokens left.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tamis.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

LONGEST_CLOSING = 4096
"""Tokens after which a way to close is given up: a schema that always asks for more has none."""

_WHITESPACE = r"[ \n]{0,16}"
_SHORTEST_FIRST = b'}]",:0123456789ntf-[{'
"""Bytes in the order in which they tend to lead to the end of a JSON text, outside of strings."""

_QUOTE, _BACKSLASH = b'"\\'

Quoting = tuple[bool, bool]
"""Whether a JSON text stands inside a string, and there behind a backslash."""


class Vocabulary:
    """A tokenizer's tokens as bytes, and what grammars need to know of them.

    Args:
        tokenizer: a 🤗 tokenizer with a `tokenizers` backend.
        vocab_size: number of logits the model returns.
        eos_token_ids: the ids that end an output.

    Raises:
        ConfigError: the grammar library is not installed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Iterable[int]
    ) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError("structured output needs llguidance; pip install 'tamis[serve]'")
        from llguidance.hf import from_tokenizer

        ending = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self.size = vocab_size
        self.tokens: LLTokenizer = from_tokenizer(
            tokenizer,
            n_vocab=vocab_size,
            eos_token=ending or None,
        )
        of_byte = {self.bytes_of(i): i for i in reversed(range(vocab_size))}
        singles = [bytes([byte]) for byte in _SHORTEST_FIRST]
        self.closers = [of_byte[byte] for byte in singles if byte in of_byte]
        self.quote = of_byte.get(b'"')

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a special token's are its name's."""
        return self.tokens.decode_bytes([token_id])


class JsonGuide:
    """What an output must be to fit a JSON schema; compiled once, for any number of outputs.

    Compiling releases the interpreter's lock.

    Args:
        vocabulary: of the model.
        schema: a JSON schema; None is any object.

    Raises:
        RequestError: the schema is not one, or asks for what cannot be guided.
    """

    def __init__(self, vocabulary: Vocabulary, schema: Mapping[str, Any] | None = None) -> None:
        from llguidance import LLMatcher

        self._vocabulary = vocabulary
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(dict(schema) if schema is not None else {"type": "object"}),
                defaults={"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE},
            )
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema cannot be used: {error}") from error
        self._matcher = LLMatcher(vocabulary.tokens, grammar, log_level=0)
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()
            raise RequestError(f"the JSON schema cannot be used: {' '.join(reason)[:500]}")
        closing = _closing(self._matcher, vocabulary, (False, False))
        if closing is None:
            raise RequestError(
                "no short text fits the JSON schema: it asks for more than "
                f"{LONGEST_CLOSING} tokens, or for ever more of itself"
            )
        self._start = closing

    @property
    def least_tokens(self) -> int:
        """Tokens that suffice for a text that fits."""
        return len(self._start)

    def start(self) -> JsonOutput:
        """The beginning of an output."""
        matcher = self._matcher.deep_copy()
        return JsonOutput(self._vocabulary, matcher, self._start, (False, False))


class JsonOutput:
    """One output under a `JsonGuide`, token by token."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: LLMatcher, closing: list[int], quoting: Quoting
    ) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._closing = closing  # tokens after which the text is complete
        self._quoting = quoting
        self._vetted: tuple[int, list[int]] | None = None  # a token, and the closing after it

    @property
    def finished(self) -> bool:
        """Whether nothing may follow any more."""
        return self._matcher.is_stopped()

    def allowed(self, remaining: int) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, bool [vocab], when `remaining` are left, this one among
        them."""
        if 0 < remaining <= len(self._closing):
            mask = np.zeros(self._vocabulary.size, dtype=np.bool_)
            mask[self._closing[0]] = True
            return mask
        return _mask(self._matcher, self._vocabulary.size)

    def vet(self, token_id: int, remaining: int) -> int:
        """The token itself, or one that leads to the end where, after it, `remaining - 1` tokens
        would not suffice for that."""
        after = self._after(token_id)
        if len(after) < remaining:
            self._vetted = (token_id, after)
            return token_id
        return self._closing[0] if self._closing else self._vocabulary.tokens.eos_token

    def observe(self, token_id: int) -> None:
        """Go on after a token that was added to the output."""
        known = self._vetted is not None and self._vetted[0] == token_id
        closing = self._vetted[1] if known and self._vetted else self._after(token_id)
        self._matcher.consume_token(token_id)
        self._closing, self._vetted = closing, None
        self._quoting = _quoting(self._quoting, self._vocabulary.bytes_of(token_id))

    def fork(self) -> JsonOutput:
        """A second output that begins as this one did so far."""
        matcher = self._matcher.deep_copy()
        return JsonOutput(self._vocabulary, matcher, self._closing, self._quoting)

    def _after(self, token_id: int) -> list[int]:
        """A way to close after one more token; the one known so far where it still leads there."""
        if self._closing and token_id == self._closing[0]:
            return self._closing[1:]
        matcher = self._matcher.deep_copy()
        matcher.consume_token(token_id)
        if matcher.is_accepting():
            return []
        trial = matcher.deep_copy()
        if self._closing and trial.consume_tokens(self._closing) and trial.is_accepting():
            return self._closing
        quoting = _quoting(self._quoting, self._vocabulary.bytes_of(token_id))
        closing = _closing(matcher, self._vocabulary, quoting)
        return [token_id] * LONGEST_CLOSING if closing is None else closing


def _closing(matcher: LLMatcher, vocabulary: Vocabulary, quoting: Quoting) -> list[int] | None:
    """Tokens that complete the text, found greedily; None where none are found in reach."""
    matcher = matcher.deep_copy()
    closing: list[int] = []
    while not matcher.is_accepting():
        tokens = matcher.compute_ff_tokens() or [_likely_end(matcher, vocabulary, quoting)]
        if len(closing) + len(tokens) > LONGEST_CLOSING or not matcher.consume_tokens(tokens):
            return None
        for token in tokens:
            quoting = _quoting(quoting, vocabulary.bytes_of(token))
        closing += tokens
    return closing


def _likely_end(matcher: LLMatcher, vocabulary: Vocabulary, quoting: Quoting) -> int:
    """An allowed token that tends to lead to the end."""
    mask = _mask(matcher, vocabulary.size)
    inside, _ = quoting
    if inside and vocabulary.quote is not None and mask[vocabulary.quote]:
        return vocabulary.quote
    closer = next((token for token in vocabulary.closers if mask[token]), None)
    return int(mask.argmax()) if closer is None else closer


def _quoting(quoting: Quoting, text: bytes) -> Quoting:
    """Where a JSON text stands after some more of it."""
    inside, escaped = quoting
    for byte in text:
        if escaped:
            escaped = False
        elif inside and byte == _BACKSLASH:
            escaped = True
        elif byte == _QUOTE:
            inside = not inside
    return inside, escaped


def _mask(matcher: LLMatcher, size: int) -> npt.NDArray[np.bool_]:
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(bits, count=size, bitorder="little").astype(np.bool_)
