"""A model and a text that every machine can make: what `tamis demo` runs when given neither."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
_MODULES = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "statistics.py", "typing.py")


def library_text() -> str:
    """Some modules of the Python standard library that runs this process, one after another."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n".join((library / name).read_text(encoding="utf-8") for name in _MODULES)


def save_random_model(directory: Path, text: str) -> None:
    """Write a Llama of 12.6 M random parameters, and a tokenizer learnt from `text`.

    Hidden size 384, 6 layers, 6 heads of 64 on 2 KV heads, a context of 32,768 tokens. The seed
    is fixed; torch's global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    _tokenizer(text).save_pretrained(directory)


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)
