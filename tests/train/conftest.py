"""A tokenizer and a text, trained once for all tests of the package."""

import pytest

from tamis.bench.tasks import corpus
from tamis.train.text import tokenize_files
from tamis.train.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(file.text for file in corpus.files_of("held_out"))


@pytest.fixture(scope="session")
def text(tokenizer):
    return tokenize_files(corpus.files_of("held_out")[:6], tokenizer.backend_tokenizer)
