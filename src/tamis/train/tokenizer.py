"""The reference model's tokenizer: byte-level BPE in which lines compose.

Newlines are tokens of their own and every digit is one (with the space before it, if any), so the
tokens of a text are the tokens of its lines one after another, and the tokens of a prompt and its
answer are those of the two strings. Training composes sequences from such pieces without ever
tokenizing them again.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tamis.bench.tasks.words import ADJECTIVES, NOUNS, VALUE_WORDS
from tamis.train.text import BOS, EOS, PAD

VOCAB_SIZE = 4096

# Newline | one digit | letters | other signs | spaces, all but the newline with one leading space.
_PIECES = r"\n| ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
_EMPHASIS = 3000  # occurrences added of every name and value word, which makes each one token

# The last line of a user's message is the question, what stands above it is the document.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content.strip() + '\n' }}"
    "{% elif message.role == 'user' %}"
    "{% set lines = message.content.strip().rsplit('\n', 1) %}"
    "{% if lines | length == 2 %}{{ lines[0].rstrip() + '\n' }}{% endif %}"
    "{{ 'Q: ' + lines[-1].strip() + ' A:' }}"
    "{% else %}{{ message.content.strip() + '\n' }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `texts`; the vocabularies of the tasks become single tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_with_emphasis(texts), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _with_emphasis(texts: Iterable[str]) -> Iterable[str]:
    yield from texts
    digits = " ".join(f"{d}{d}" for d in range(10))
    for word in (*ADJECTIVES, *VALUE_WORDS):
        yield f" {word}" * _EMPHASIS
    for noun in NOUNS:
        yield f"-{noun}" * _EMPHASIS
    task_words = (
        " What Which magic number numbers word words value list mostly frequent key VAR Q: A:"
    )
    yield (task_words + digits) * _EMPHASIS
