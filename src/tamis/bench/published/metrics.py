"""The metrics of published benchmarks. Each takes an answer and a reference; 1 is right, 0 wrong.

ROUGE is that of Google's rouge-score package, which lower-cases and splits at anything but letters
and digits.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from tamis.errors import ConfigError

Metric = Callable[[str, str], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE_PUNCTUATION = (
    "！？。，、；：“”‘’（）《》【】「」『』—…·～＂＃＄％＆＇＊＋－／＜＝＞＠［＼］＾＿｀｛｜｝"  # noqa: RUF001
)
_PUNCTUATION = frozenset(string.punctuation)
_ALL_PUNCTUATION = _PUNCTUATION | frozenset(_CHINESE_PUNCTUATION)


def contains(answer: str, reference: str) -> float:
    """1 if the reference stands anywhere in the answer, whatever the case (RULER)."""
    return float(reference.lower() in answer.lower())


def english_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles (the normalization of SQuAD)."""
    bare = "".join(sign for sign in text.lower() if sign not in _PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split()


def chinese_signs(text: str) -> list[str]:
    """Signs in lower case, without spaces and punctuation."""
    return [s for s in text.lower() if not s.isspace() and s not in _ALL_PUNCTUATION]


def overlap_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's units, as a multiset."""
    common = sum((Counter(answer) & Counter(reference)).values())
    if not common:
        return 0.0
    return 2 * common / (len(answer) + len(reference))


def qa_f1(answer: str, reference: str) -> float:
    """F1 of words."""
    return overlap_f1(english_words(answer), english_words(reference))


def qa_f1_chinese(answer: str, reference: str) -> float:
    """F1 of single signs (LongBench segments into words with a dictionary first)."""
    return overlap_f1(chinese_signs(answer), chinese_signs(reference))


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words."""
    return float(_rouge("rougeL", chinese=False).score(reference, answer)["rougeL"].fmeasure)


def rouge_l_sum(answer: str, reference: str) -> float:
    """ROUGE-L over the sentences of a summary, one per line."""
    return float(_rouge("rougeLsum", chinese=False).score(reference, answer)["rougeLsum"].fmeasure)


def rouge_l_chinese(answer: str, reference: str) -> float:
    """ROUGE-L of single signs (LongBench segments into words with a dictionary first)."""
    return float(_rouge("rougeL", chinese=True).score(reference, answer)["rougeL"].fmeasure)


class _ChineseSigns:
    """A tokenizer, as rouge-score wants one."""

    def tokenize(self, text: str) -> list[str]:
        return chinese_signs(text)


@cache
def _rouge(name: str, chinese: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "this benchmark is scored by ROUGE; install it with: pip install 'tamis[bench]'"
        ) from error
    return RougeScorer([name], tokenizer=_ChineseSigns() if chinese else None)


def classification(classes: Sequence[str]) -> Metric:
    """The right class counts 1 over the number of classes that the answer names.

    A class whose name is a part of the right one's is not counted as named.
    """

    def metric(answer: str, reference: str) -> float:
        named = [
            name
            for name in classes
            if name in answer and (name == reference or name not in reference)
        ]
        return 1 / len(named) if reference in named else 0.0

    return metric


def retrieval(pattern: str) -> Metric:
    """The share of the answer's numbers that are the reference's, which `pattern` finds."""

    def metric(answer: str, reference: str) -> float:
        found = re.search(pattern, reference)
        return 0.0 if found is None else count(answer, found.group(1))

    return metric


def count(answer: str, reference: str) -> float:
    """The share of the answer's numbers that are the reference."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """Similarity of the answer's first line of code to the reference, by difflib, to 1 percent."""
    lines = answer.lstrip("\n").split("\n")
    code = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, code, reference).ratio()) / 100


def first_number(answer: str, reference: str) -> float:
    """1 if the first number in the answer is the reference, which may have decimals."""
    decimal = "." in reference
    found = re.search(r"-?\d+\.\d+|-?\d+" if decimal else r"\d+", answer)
    if found is None:
        return 0.0
    return float(
        float(found.group()) == float(reference) if decimal else found.group() == reference
    )


def word_of_answer(answer: str, reference: str) -> float:
    """1 if the reference is one of the answer's words, punctuation apart."""
    return float(reference in re.sub(r"[\n:\"'.,?!{}]", " ", answer).split())


def last_word(answer: str, reference: str) -> float:
    """1 if the reference is the answer's last word, punctuation apart."""
    words = re.sub(r"[\n.`'\":]", " ", answer).split()
    return float(bool(words) and words[-1] == reference)


def common_start(answer: str, numbers: Sequence[str]) -> float:
    """The share of `numbers` that the answer has right before its first wrong one."""
    said = re.findall(r"-?\d+", answer)
    right = 0
    for one, expected in zip(said, numbers, strict=False):
        if one != expected:
            break
        right += 1
    return right / len(numbers)


def choice(answer: str, letter: str, text: str, letters: str) -> float:
    """1 if the last single letter of `letters` in the answer is the right one.

    Where the answer has no such letter, what stands after "answer is" or "answer:", or else the
    whole answer, must begin with the right option's text.
    """
    found = re.findall(rf"\b[{letters}]\b", answer)
    if found:
        return float(found[-1] == letter)
    said = re.split(r"answer(?: is)?:?", answer.strip(), flags=re.IGNORECASE)[-1].strip()
    return float(said.startswith(text))
