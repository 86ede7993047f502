"""Tokens and their log-probabilities as responses show them."""

from __future__ import annotations

from collections.abc import Iterable

from tamis.engine.outputs import TokenLogprob as EngineLogprob
from tamis.guide import Vocabulary
from tamis.server.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TokenTexts:
    """Writes log-probabilities in the two forms of OpenAI's API."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def text(self, token_id: int) -> str:
        """A token's text; of one that is a part of a character, its bytes: `bytes:\\xe2\\x82`."""
        data = self._vocabulary.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decode(self, token_ids: list[int]) -> str:
        """The text of some tokens."""
        return self._vocabulary.tokens.decode_str(token_ids)

    def chat(self, logprobs: Iterable[EngineLogprob]) -> ChatLogprobs:
        content = [
            TokenLogprob(
                **self._top(entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[self._top(token_id, value) for token_id, value in entry.top],
            )
            for entry in logprobs
        ]
        return ChatLogprobs(content=content)

    def completion(
        self, logprobs: Iterable[EngineLogprob], offset: int = 0, first: int | None = None
    ) -> CompletionLogprobs:
        """The form of `/v1/completions`.

        Args:
            offset: characters of the text before these tokens.
            first: a token before all others, whose log-probability nobody can tell.
        """
        entries: list[tuple[int, EngineLogprob | None]] = [(e.token_id, e) for e in logprobs]
        if first is not None:
            entries.insert(0, (first, None))
        tokens = [self.text(token_id) for token_id, _ in entries]
        offsets = []
        for (token_id, _), token in zip(entries, tokens, strict=True):
            offsets.append(offset)
            if not self._vocabulary.tokens.is_special_token(token_id):  # they are not in the text
                offset += len(token)
        top = [
            {self.text(token_id): max(value, _LEAST) for token_id, value in entry.top}
            if entry is not None
            else None
            for _, entry in entries
        ]
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[None if e is None else max(e.logprob, _LEAST) for _, e in entries],
            top_logprobs=top if any(top) else None,
            text_offset=offsets,
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self.text(token_id),
            logprob=max(logprob, _LEAST),
            bytes=list(self._vocabulary.bytes_of(token_id)),
        )
