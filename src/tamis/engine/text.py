"""From tokens to text, one token at a time: whole characters only, and stop strings found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tamis.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for bytes that are not, or not yet, a character."""


class TextStream:
    """The text of one output, emitted as early as it is certain.

    Special tokens are left out. Two things are held back: bytes that may still become a character
    (`tokenizers.decoders.DecodeStream` does this too, but keeps them for good when the output ends
    there), and text that may still become a stop string.

    Args:
        tokenizer: a 🤗 tokenizer with a `tokenizers` backend.
        stop: strings that end the text. The one that is complete first wins; among several
            complete at the same character, the longest. How the text falls into tokens does not
            matter.
        include_stop: whether the text ends with the stop string or before it.
        min_tokens: stop strings are looked for in what follows the first `min_tokens - 1` tokens.
        context: token ids that come before the first one pushed, for example the last few of the
            prompt: with them, a word that continues the prompt keeps its leading space in the
            tokenizers that strip it at the start of a text.

    Attributes:
        stop_reason: the stop string that ended the text, None until then.

    Raises:
        ModelError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        *,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast backend, which streaming text needs: "
                "put a tokenizer.json in the model's directory (save_pretrained of a fast "
                "tokenizer writes one), or load the model without a tokenizer and use token ids"
            )
        self.stop_reason: str | None = None
        self._backend = backend
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._tokens_before_stop = min_tokens - 1
        self._emitted: list[str] = []
        self._held = ""
        # Tokens are decoded in groups that end on whole characters. The group before comes along:
        # a decoder may treat the first token of a text differently.
        self._before = list(context)
        self._group: list[int] = []
        self._shown = self._decode(self._before).rstrip(INCOMPLETE)

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._emitted)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text; what is pushed afterwards is ignored."""
        return self.stop_reason is not None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is certain now, possibly empty."""
        if self.stopped:
            return ""
        self._group.append(token_id)
        decoded = self._decode(self._before + self._group)
        certain = decoded.rstrip(INCOMPLETE)
        new = certain[len(self._shown) :]
        self._shown = max(self._shown, certain, key=len)
        if decoded == certain and new:
            self._before, self._group = self._group, []
            self._shown = self._decode(self._before)
        elif decoded == certain and self._shown:
            self._group.pop()  # it shows nothing: an endless run of such tokens must not pile up
        self._tokens_before_stop -= 1
        if self._tokens_before_stop >= 0:
            return self._emit(new)
        return self._emit(self._until_stop(new))

    def flush(self) -> str:
        """End the text; returns what was held back, incomplete characters as U+FFFD."""
        if self.stopped:
            return ""
        rest = self._decode(self._before + self._group)[len(self._shown) :]
        self._before, self._group, self._shown = [], [], ""
        text = self._until_stop(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return self._emit(text)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def _emit(self, text: str) -> str:
        if text:
            self._emitted.append(text)
        return text

    def _until_stop(self, new: str) -> str:
        """Held and new text up to the first stop string, or to where one may begin."""
        if not self._stop:
            return new
        text = self._held + new
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end, start, self.stop_reason = min(found)
            self._held = ""
            return text[:end] if self._include_stop else text[:start]
        longest = min(len(text), max(map(len, self._stop)) - 1)
        n_held = next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)),
            0,
        )
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]
