"""What single tokens show adds up to the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tamis.inspection.texts import token_texts
from tamis.model import load_model
from tests.tiny_models import BOS


def test_tokens_add_up_to_the_text(tiny_dir: Callable[[str], Path]) -> None:
    tokenizer = load_model(tiny_dir("llama"), dtype="float32", device="cpu").tokenizer
    n, *accented, space = tokenizer("né ", add_special_tokens=False)[
        "input_ids"
    ]  # a token per byte
    texts = token_texts(tokenizer, [BOS, n, *accented, space, accented[0]])
    name = tokenizer.convert_ids_to_tokens(BOS)
    assert texts == (name, "n", "", "é", " ", "\N{REPLACEMENT CHARACTER}")


def test_without_a_tokenizer_tokens_show_their_ids() -> None:
    assert token_texts(None, [7, 12]) == ("[7]", "[12]")
    assert token_texts(None, []) == ()
