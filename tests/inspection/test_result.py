"""What an inspection says of the tokens that were kept and read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tamis.errors import RequestError
from tamis.inspection import Inspection


def test_heads_that_keep_a_prompt_token_are_counted(inspection: Inspection) -> None:
    assert inspection.keep_counts().tolist() == [2, 1, 0, 1, 1, 0, 0, 0, 4, 4]
    kept = inspection.kept()
    assert kept.shape == (4, 10)
    assert kept[1].nonzero()[0].tolist() == [0, 8, 9]


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("42", [(3, 5)]),
        ("e", [(0, 1), (1, 2)]),
        ("2.", [(4, 6)]),
        ("is 4", [(2, 4)]),
        ("?", [(8, 9)]),
    ],
)
def test_a_text_is_found_in_the_tokens_that_show_it(
    inspection: Inspection, text: str, places: list[tuple[int, int]]
) -> None:
    assert [(found.start, found.stop) for found in inspection.find(text)] == places


def test_tokens_that_show_nothing_belong_to_no_text(inspection: Inspection) -> None:
    texts = ("a", "", "é", "b")  # the first byte of the second character shows nothing
    shorter = replace(inspection, prompt_texts=texts, prompt_token_ids=(1, 2, 3, 4))
    assert shorter.find("é") == [range(2, 3)]
    assert shorter.find("b") == [range(3, 4)]


@pytest.mark.parametrize("text", ["", "43", "<B>"])
def test_a_text_that_is_not_there_is_named(inspection: Inspection, text: str) -> None:
    with pytest.raises(RequestError, match=f"{text!r} does not stand in the prompt"):
        inspection.find(text)


def test_reads_are_compared_with_exact_attention(inspection: Inspection) -> None:
    steps = inspection.steps()
    assert steps.generated.tolist() == [0, 1]
    assert steps.tokens.tolist() == [[2, 4], [2, 4]]
    assert steps.dense.tolist() == [[11, 4], [12, 4]]
    assert steps.share[1].tolist() == [2 / 12, 1.0]


def test_several_passes_of_a_step_add_up(inspection: Inspection) -> None:
    twice = replace(inspection, reads=inspection.reads[:2] * 2)
    assert twice.steps().tokens.tolist() == [[4, 8]]


def test_a_token_is_read_where_it_is_kept_and_its_page_is_chosen(inspection: Inspection) -> None:
    # "42" is the third and fourth token of the one head that keeps it: page 1, read at step 1.
    assert inspection.read_share(range(3, 5)) == 1 / 8
    # The last prompt token: page 2 and page 1 of layer 0's heads; layer 1 reads all it has.
    assert inspection.read_share(range(9, 10)) == (2 + 4) / 8


def test_what_no_page_tells_is_not_guessed(inspection: Inspection) -> None:
    unknown = replace(inspection.reads[0], pages=None)
    assert replace(inspection, reads=(unknown,)).read_share(range(3, 5)) is None
    assert replace(inspection, reads=()).read_share(range(3, 5)) is None
    assert replace(inspection, reads=()).steps().tokens.shape == (0, 2)
