"""Documents with questions: what is asked stands in them, and the answers are where it is said."""

import pytest
import torch

from tamis.errors import ConfigError
from tamis.model import load_model
from tamis.train.methods.documents import conversations

LENGTH = 2500  # the tiny models' tokenizer counts bytes


@pytest.fixture(scope="module")
def model(tiny_dir):
    loaded = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    loaded.max_length = 8192
    return loaded


def test_six_questions_follow_each_document_with_answers_that_stand_in_it(model):
    ids, places = next(conversations(model, LENGTH))
    document = model.tokenizer.decode(ids[:LENGTH], skip_special_tokens=True)
    asked = model.tokenizer.decode(ids[LENGTH:])
    answers = model.tokenizer.decode(ids[places + 1]).splitlines()
    assert asked.count("Q: ") == len(answers) == 6
    for answer in answers:
        assert f"{answer}\n" in asked
        assert answer.split()[-1].rstrip(".") in document


def test_documents_are_a_function_of_the_seed(model):
    first, other = conversations(model, LENGTH), conversations(model, LENGTH)
    one, again, next_one = next(first)[0], next(other)[0], next(first)[0]
    assert torch.equal(one, again)
    assert not torch.equal(one, next_one)
    assert not torch.equal(one, next(conversations(model, LENGTH, seed=1))[0])


def test_a_context_that_is_too_short_is_refused(tiny_dir):
    short = load_model(tiny_dir("llama"), dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match="the model's context is 512"):
        next(conversations(short, LENGTH))
