"""The metrics of published benchmarks, against cases worked by hand."""

from __future__ import annotations

import pytest

from tamis.bench.published import metrics
from tamis.bench.published.ruler import string_match_all, string_match_part


def test_ruler_counts_references_found_whatever_the_case() -> None:
    assert string_match_all("The answers: 123 and ABC.", ("123", "abc", "zzz")) == 2 / 3
    assert string_match_part("It is Paris", ("london", "paris")) == 1
    assert string_match_part("It is Rome", ("london", "paris")) == 0


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1),  # articles, case and punctuation do not count
        ("the tall tower", "eiffel tower", 0.5),  # 1 of 2 said, 1 of 2 wanted
        ("red red blue", "red blue blue green", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("", "tower", 0),
        ("nothing of it", "tower", 0),
    ],
)
def test_f1_is_of_words_as_a_multiset(said: str, right: str, score: float) -> None:
    assert metrics.qa_f1(said, right) == pytest.approx(score)


def test_chinese_f1_is_of_signs() -> None:
    # 2 of 3 signs said are among the 4 wanted.
    expected = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert metrics.qa_f1_chinese("北京。 人", "北京大学") == pytest.approx(expected)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # "the cat sat on mat" of 6 and 6 words: "the cat on the mat" is 5 long.
    said, right = "the cat lay on the mat", "the cat sat on the mat"
    assert metrics.rouge_l(said, right) == pytest.approx(5 / 6)
    assert metrics.rouge_l("", right) == 0
    assert metrics.rouge_l(right, right) == 1


def test_rouge_l_sum_takes_sentences_in_any_order() -> None:
    assert metrics.rouge_l_sum("b c\na d", "a d\nb c") == 1
    assert metrics.rouge_l("b c\na d", "a d\nb c") == 0.5


def test_chinese_rouge_is_of_signs() -> None:
    # 京大 is the longest common subsequence, of 3 and 4 signs.
    assert metrics.rouge_l_chinese("京大北", "北京大学") == pytest.approx(2 * 2 / 7)


def test_a_class_counts_less_the_more_are_named_beside_it() -> None:
    metric = metrics.classification(["Food", "Date", "Food plant", "Animal"])
    assert metric("It is Food plant", "Food plant") == 1  # Food is a part of its name
    assert metric("Food or Animal", "Animal") == 1 / 2
    assert metric("Date", "Animal") == 0
    assert metric("", "Animal") == 0


def test_retrieval_and_count_share_out_the_numbers_said() -> None:
    paragraph = metrics.retrieval(r"Paragraph (\d+)")
    assert paragraph("Paragraph 3", "Paragraph 3") == 1
    assert paragraph("3, no, 13 or 3", "Paragraph 3") == pytest.approx(2 / 3)
    assert paragraph("none", "Paragraph 3") == 0
    assert metrics.count("There are 7, or 8", "7") == 1 / 2


def test_code_is_compared_by_its_first_line_that_is_code() -> None:
    assert metrics.code_similarity("\n# no\n```python\nreturn x\nmore", "return x") == 1
    # difflib: 2 · matches / lengths; "return " and "" match of "return x" and "return y".
    assert metrics.code_similarity("return x", "return y") == pytest.approx(0.88)  # 14 / 16
    assert metrics.code_similarity("", "return x") == 0


def test_the_first_number_said_counts() -> None:
    assert metrics.first_number("It is 71432, not 5.", "71432") == 1
    assert metrics.first_number("5, then 71432", "71432") == 0
    assert metrics.first_number("none", "71432") == 0
    assert metrics.first_number("about -2.50", "-2.5") == 1


def test_words_of_an_answer() -> None:
    assert metrics.word_of_answer('{"key": "a-b"}', "a-b") == 1
    assert metrics.word_of_answer("a-b-c", "a-b") == 0
    assert metrics.last_word("The result is: `-7`.", "-7") == 1
    assert metrics.last_word("-7 or 8", "-7") == 0
    assert metrics.last_word("", "-7") == 0


def test_a_list_counts_up_to_its_first_mistake() -> None:
    assert metrics.common_start("1, -2, 3, 9", ["1", "-2", "3", "4"]) == 3 / 4
    assert metrics.common_start("9, -2", ["1", "-2"]) == 0
    assert metrics.common_start("1 2 3 4 5", ["1", "2"]) == 1


def test_a_choice_is_the_last_letter_or_the_text_of_the_option() -> None:
    def judged(said: str) -> float:
        return metrics.choice(said, "B", "the butler", "ABCD")

    assert judged("B") == 1
    assert judged("Not A, so B.") == 1
    assert judged("C") == 0
    assert judged("The answer is: the butler") == 1
    assert judged("the butler did it") == 1
    assert judged("the gardener") == 0
