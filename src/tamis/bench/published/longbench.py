"""LongBench's files: `input`, `context`, `answers`, `dataset` and `all_classes` per line.

Metrics and answer lengths are LongBench's, with two departures: ROUGE-L is rouge-score's, and
Chinese is compared sign by sign. The instructions around context and input are in our own words,
so scores are comparable between plans, and only roughly with published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tamis.bench.exercise import Exercise
from tamis.bench.published import metrics
from tamis.bench.published.lines import Line, read_lines
from tamis.bench.published.metrics import Metric


@dataclass(frozen=True)
class _Family:
    """Datasets of one kind: the prompt, the metric, and what of the answer counts.

    `completion`: the prompt is a text to go on with, not an instruction. `first_line`: only the
    answer's first line is judged.
    """

    prompt: str
    metric: Metric | None  # None: classification, which needs the line's classes
    completion: bool = False
    first_line: bool = False


_QA = _Family(
    "Read the text and answer the question in as few words as possible.\n\n{context}\n\n"
    "Answer in as few words as possible.\n\nQuestion: {input}\nAnswer:",
    metrics.qa_f1,
)
_QA_CHINESE = _Family(
    "阅读下文，简短地回答问题。\n\n{context}\n\n问题：{input}\n回答：",  # noqa: RUF001
    metrics.qa_f1_chinese,
)
_SEARCH_CHINESE = _Family(
    "根据下列文章回答问题。\n\n{context}\n\n问题：{input}\n回答：",  # noqa: RUF001
    metrics.rouge_l_chinese,
)
_SUMMARY = _Family(
    "{context}\n\nWrite a one-page summary of the text above.\n\nSummary:", metrics.rouge_l
)
_QUERY_SUMMARY = _Family(
    "{context}\n\nAnswer the query on the transcript above in one or more sentences.\n\n"
    "Query: {input}\nAnswer:",
    metrics.rouge_l,
)
_SUMMARY_CHINESE = _Family(
    "{context}\n\n请总结以上会议记录。\n\n总结：",  # noqa: RUF001
    metrics.rouge_l_chinese,
)
_FEW_SHOT = "{context}\n{input}"
_RETRIEVAL = _Family(
    "{context}\n\nWhich of the paragraphs above does this abstract summarize? Answer with its "
    "name only, such as Paragraph 1.\n\nAbstract: {input}\nAnswer:",
    metrics.retrieval(r"Paragraph (\d+)"),
)
_RETRIEVAL_CHINESE = _Family(
    "{context}\n\n下面的摘要来自以上哪一段？请只回答段落编号，如：段落1。\n\n摘要：{input}\n回答：",  # noqa: RUF001
    metrics.retrieval(r"段落(\d+)"),
)
_COUNT = _Family(
    "{context}\n\nSome of the paragraphs above are repeated. How many different ones are there? "
    "Answer with the number only.\n\nAnswer:",
    metrics.count,
)
_CODE = _Family("{context}{input}", metrics.code_similarity, completion=True)

_CLASSES = _Family(_FEW_SHOT, None, completion=True, first_line=True)

DATASETS: dict[str, tuple[_Family, int]] = {
    "narrativeqa": (_QA, 128),
    "qasper": (_QA, 128),
    "multifieldqa_en": (_QA, 64),
    "multifieldqa_zh": (_QA_CHINESE, 64),
    "hotpotqa": (_QA, 32),
    "2wikimqa": (_QA, 32),
    "musique": (_QA, 32),
    "dureader": (_SEARCH_CHINESE, 128),
    "gov_report": (_SUMMARY, 512),
    "qmsum": (_QUERY_SUMMARY, 512),
    "multi_news": (_SUMMARY, 512),
    "vcsum": (_SUMMARY_CHINESE, 512),
    "trec": (_CLASSES, 64),
    "triviaqa": (_Family(_FEW_SHOT, metrics.qa_f1, completion=True, first_line=True), 32),
    "samsum": (_Family(_FEW_SHOT, metrics.rouge_l, completion=True, first_line=True), 128),
    "lsht": (_CLASSES, 64),
    "passage_count": (_COUNT, 32),
    "passage_retrieval_en": (_RETRIEVAL, 32),
    "passage_retrieval_zh": (_RETRIEVAL_CHINESE, 32),
    "lcc": (_CODE, 64),
    "repobench-p": (_CODE, 64),
}
"""Every dataset: its family, and the most tokens of an answer."""


def load_longbench(path: Path) -> list[Exercise]:
    """The exercises of one LongBench or LongBench-E file.

    Raises:
        ConfigError: it cannot be read, or a line lacks a field or names an unknown dataset; names
            the file and the line.
    """
    return [_exercise(line, i) for i, line in enumerate(read_lines(path, "LongBench"))]


def _exercise(line: Line, index: int) -> Exercise:
    name = line.text("dataset")
    known = DATASETS.get(name.removesuffix("_e"))
    if known is None:
        raise line.error(f"there is no LongBench dataset {name!r}; there are {', '.join(DATASETS)}")
    family, max_tokens = known
    metric = family.metric or metrics.classification(line.texts("all_classes"))
    references = line.texts("answers")
    parts = {"context": line.text("context"), "input": line.text("input")}
    return Exercise(
        task=f"longbench/{name}",
        length=None,
        sample=index,
        question=0,
        text=family.prompt.format_map(parts),
        expected=references,
        score=_Best(metric, references, family.first_line),
        max_tokens=max_tokens,
        completion=family.completion,
        source=line.where,
    )


@dataclass(frozen=True)
class _Best:
    """The best score against any of the references."""

    metric: Metric
    references: tuple[str, ...]
    first_line: bool

    def __call__(self, answer: str) -> float:
        if self.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        return max(self.metric(answer, reference) for reference in self.references)
