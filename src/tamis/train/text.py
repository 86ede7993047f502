"""Token arrays of a corpus split, cut at line ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from tamis.bench.tasks.corpus import SourceFile

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
NEWLINE = "Ċ"  # as byte-level vocabularies spell it


@dataclass(frozen=True)
class TokenText:
    """A split as one token array.

    tokens [tokens] int64: the files one after another, each ended by the end-of-text token.
    starts [lines] int64: the index of every line's first token.
    """

    tokens: np.ndarray
    starts: np.ndarray
    newline: int

    @classmethod
    def of(cls, tokens: np.ndarray, newline: int) -> TokenText:
        """The text of `tokens`, its lines found by their `newline` tokens."""
        starts = np.concatenate([[0], np.flatnonzero(tokens[:-1] == newline) + 1])
        return cls(tokens, starts, newline)

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`length` consecutive tokens from a random line start; the last one is a newline."""
        if length == 0:
            return np.zeros(0, np.int64)
        if length >= len(self.tokens):
            raise ValueError(f"a window of {length} tokens in a text of {len(self.tokens)}")
        last = np.searchsorted(self.starts, len(self.tokens) - length, side="right")
        start = int(self.starts[rng.integers(last)])
        window = self.tokens[start : start + length].copy()
        window[-1] = self.newline
        return window


def tokenize_files(files: Sequence[SourceFile], tokenizer: Tokenizer) -> TokenText:
    """Tokenize a split once; nothing else of the text is tokenized again during training."""
    newline, end = (tokenizer.token_to_id(token) for token in (NEWLINE, EOS))
    if newline is None or end is None:
        raise ValueError(f"the tokenizer lacks {NEWLINE!r} or {EOS!r}; use train_tokenizer's")
    pieces: list[np.ndarray] = []
    for encoded in tokenizer.encode_batch([file.text for file in files], add_special_tokens=False):
        pieces.append(np.asarray([*encoded.ids, end], np.int64))
    return TokenText.of(np.concatenate(pieces), newline)
