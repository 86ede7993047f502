"""Documents: exact lengths, depths as asked, answers where they should be, seeds and cache."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from tamis.bench.tasks import corpus
from tamis.bench.tasks.compose import Haystack, hide, weave
from tamis.bench.tasks.samples import Suite, make_samples
from tamis.bench.tasks.scenes import TASKS
from tamis.errors import ConfigError


class Encoder:
    """The part of a 🤗 tokenizer that tasks use, over a BPE that merges across digits and lines."""

    def __init__(self, core):
        self.core = core

    def encode(self, text):
        return self.core.encode(text).ids


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = corpus.haystack_lines()
    core.train_from_iterator(lines[:4000], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return Encoder(core)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [900, 1531])
def test_documents_have_the_exact_length_and_hold_every_fact_once(task, length, tokenizer):
    for sample in make_samples(Suite(task, length, 3, seed=5), tokenizer):
        assert len(tokenizer.encode(sample.document)) == length
        assert sample.document.endswith("\n")
        for question in sample.questions:
            for target in question.targets:
                assert target in sample.document
            assert question.prompt not in sample.document
            assert sample.prompt(0) == sample.document + sample.questions[0].prompt


@pytest.mark.parametrize("task", ["single", "multi_key", "key_value"])
def test_the_asked_fact_stands_once_and_at_its_depth(task, tokenizer):
    samples = make_samples(Suite(task, 1200, 5, kinds=("number",)), tokenizer)
    assert [round(sample.depths[0], 2) for sample in samples] == pytest.approx(
        [0.1, 0.3, 0.5, 0.7, 0.9], abs=0.02
    )
    for sample in samples:
        (question,), (target,) = sample.questions, sample.questions[0].targets
        key = question.prompt.split("?")[0].split()[-1]
        assert sample.document.count(f" {key} ") == 1
        assert sample.document.count(target) == 1
        place = sample.document.index(f" {key} ") / len(sample.document)
        assert place == pytest.approx(sample.depths[0], abs=0.06)


def test_facts_stand_alone_on_lines_of_real_text(tokenizer):
    (sample,) = make_samples(Suite("multi_key", 1500, 1), tokenizer)
    lines = sample.document.splitlines(keepends=True)
    text = set(corpus.haystack_lines())
    facts = [line for line in lines if line.startswith("The magic ")]
    others = [line for line in lines if not line.startswith("The magic ")]
    assert len(facts) == 16
    assert sum(line in text for line in others) >= len(others) - 1  # the last one may be cut


def test_seeds_reproduce_and_differ(tokenizer):
    suite = Suite("multi_turn", 900, 2, seed=1)
    assert make_samples(suite, tokenizer) == make_samples(suite, tokenizer)
    assert make_samples(suite, tokenizer) != make_samples(replace(suite, seed=2), tokenizer)


@pytest.mark.parametrize("kind", ["word", "number"])
@pytest.mark.parametrize("phrasing", ["restated", "natural"])
def test_kinds_and_phrasings_are_as_asked(kind, phrasing, tokenizer):
    suite = Suite("single", 300, 4, kinds=(kind,), phrasings=(phrasing,))
    for sample in make_samples(suite, tokenizer):
        assert sample.questions[0].kind == kind
        assert sample.questions[0].phrasing == phrasing


def test_multi_turn_asks_six_questions_of_three_tasks_on_one_document(tokenizer):
    (sample,) = make_samples(Suite("multi_turn", 1500, 1), tokenizer)
    assert len(sample.questions) == len({question.prompt for question in sample.questions}) == 6
    openings = {
        question.prompt.split()[2] + question.prompt.split()[3] for question in sample.questions
    }
    assert openings == {"isthe", "iskey"}
    assert any(question.prompt.startswith("Q: What is the value") for question in sample.questions)
    second = sample.prompt(1, history=True)
    first = sample.questions[0]
    assert second == (
        sample.document + first.prompt + first.answer + "\n" + sample.questions[1].prompt
    )


def test_samples_come_back_from_the_cache_as_they_were(tokenizer, tmp_path):
    suite = Suite("multi_turn", 900, 2)
    made = make_samples(suite, tokenizer, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert make_samples(suite, tokenizer, cache=tmp_path) == made
    changed = [json.loads(line) for line in file.read_text().splitlines()]
    changed[0]["document"] = "from the cache\n"
    file.write_text("".join(json.dumps(one) + "\n" for one in changed))
    assert make_samples(suite, tokenizer, cache=tmp_path)[0].document == "from the cache\n"
    make_samples(replace(suite, seed=1), tokenizer, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_users_file_is_the_haystack(tokenizer, tmp_path):
    file = tmp_path / "novel.txt"
    file.write_text("It was a dark and stormy night in the town.\r\n" * 300)
    (sample,) = make_samples(Suite("single", 400, 1, haystack=file), tokenizer)
    assert sample.document.count("It was a dark and stormy night in the town.\n") > 10
    assert "\r" not in sample.document


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (Suite("needles", 500, 1), "no task 'needles'; there are single, multi_key"),
        (Suite("single", 500, 0), "at least one sample"),
        (Suite("multi_key", 40, 1), "facts alone take [0-9]+ tokens; a length of 40 is too short"),
        (Suite("single", 500, 1, haystack=corpus.Path("/nowhere/x.txt")), "/nowhere/x.txt"),
    ],
)
def test_wrong_suites_are_refused_with_what_would_be_right(suite, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        make_samples(suite, tokenizer)


def test_a_task_longer_than_the_models_context_names_the_limit(tokenizer):
    with pytest.raises(ConfigError, match=r"length 500 needs 5\d\d tokens.* context is 500"):
        make_samples(Suite("single", 500, 1), tokenizer, context=500)
    assert make_samples(Suite("single", 500, 1), tokenizer, context=600)


def test_weave_puts_facts_at_the_nearest_line_end():
    lines = ["aaaa\n", "bbbb\n", "cccc\n", "dddd\n"]
    assert weave(lines, ["X\n"], [0.0]) == "X\naaaa\nbbbb\ncccc\ndddd\n"
    assert weave(lines, ["X\n"], [0.45]) == "aaaa\nbbbb\nX\ncccc\ndddd\n"
    assert weave(lines, ["X\n", "Y\n"], [0.3, 1.0]) == "aaaa\nX\nbbbb\ncccc\ndddd\nY\n"
    assert weave(lines, ["X\n", "Y\n"], [0.5, 0.5]) == "aaaa\nbbbb\nX\nY\ncccc\ndddd\n"
    assert weave([], ["X\n", "Y\n"], [0.1, 0.9]) == "X\nY\n"


@pytest.mark.parametrize("length", range(60, 90))
def test_every_length_is_hit_exactly(length, tokenizer):
    def count(text):
        return len(tokenizer.encode(text))

    haystack = Haystack(corpus.haystack_lines()[1000:1200], count)
    document = hide(["A fact.\n"], [0.5], haystack, 7, length, count)
    assert count(document) == length
    assert document.count("A fact.\n") == 1
