"""What each token of a prompt shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tamis.engine.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_texts(
    tokenizer: PreTrainedTokenizerBase | None, token_ids: Sequence[int]
) -> tuple[str, ...]:
    """The text of each token; joined, the text of all of them.

    A character of several tokens is shown by the last of them. Special tokens show their names,
    and without a tokenizer every token its id in brackets.
    """
    if tokenizer is None:
        return tuple(f"[{token_id}]" for token_id in token_ids)
    stream, special = TextStream(tokenizer), set(tokenizer.all_special_ids)
    texts = []
    for token_id in token_ids:
        shown = stream.push(token_id)
        if token_id in special:
            shown += str(tokenizer.convert_ids_to_tokens(token_id))
        texts.append(shown)
    if texts:
        texts[-1] += stream.flush()
    return tuple(texts)
