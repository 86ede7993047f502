import random
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from tamis.engine.text import TextStream
from tamis.errors import ModelError

CORPUS = [
    "the engine runs the model and the model writes the text",
    "a b c d e. STOP! 😀 naïve",
] * 4


def wrap(backend):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module")
def byte_level():
    """Byte-level BPE as in GPT-2: a character outside ASCII is several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrap(backend)


@pytest.fixture(scope="module")
def sentencepiece():
    """Llama 2's scheme: "▁" marks spaces, the first of a text is stripped, bytes as a fallback."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdehlortw", "▁world", "▁hello"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(backend)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ids_of(tokenizer, *pieces):
    return tokenizer.convert_tokens_to_ids(list(pieces))


def stream_all(stream, ids):
    return [stream.push(token_id) for token_id in ids] + [stream.flush()]


# Whole characters


@pytest.mark.parametrize(
    "text",
    [
        "the model writes",
        " leading space",
        "naïve 😀😀👩‍👩‍👧 日本語 ",
        "line\n\n  two",
        "\ufffd kept \ufffd",
    ],
)
def test_increments_join_to_the_decoded_text(byte_level, text):
    stream = TextStream(byte_level)
    parts = stream_all(stream, encode(byte_level, text))
    assert "".join(parts) == text
    assert stream.text == text
    assert not stream.stopped


def test_a_character_split_over_tokens_appears_once_it_is_whole(byte_level):
    ids = encode(byte_level, "x🦊y")
    assert len(ids) > 4
    stream = TextStream(byte_level)
    parts = [stream.push(token_id) for token_id in ids]
    assert parts[0] == "x"
    assert set(parts[1:-2]) == {""}
    assert parts[-2:] == ["🦊", "y"]


def test_characters_appear_as_they_complete_even_if_each_token_ends_inside_the_next():
    pieces = [bytes([0xF0]), bytes([0x9F, 0xA6, 0x8A, 0xF0])]  # "🦊" and the first byte of a next
    to_text = dict(zip(range(256), _gpt2_alphabet(), strict=True))
    vocab = {"".join(to_text[b] for b in piece): i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [stream.push(i) for i in (0, 1, 1)] == ["", "🦊", "🦊"]
    assert stream.flush() == "\ufffd"


def _gpt2_alphabet():
    """The character that stands for each byte in byte-level vocabularies."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def test_an_output_that_ends_inside_a_character_shows_it_as_replaced(byte_level):
    ids = encode(byte_level, "the 🦊")[:-1]
    stream = TextStream(byte_level)
    parts = stream_all(stream, ids)
    assert "".join(parts[:-1]) == "the "
    assert parts[-1] == "\ufffd"
    assert stream.text == byte_level.decode(ids)
    assert stream.flush() == ""


def test_special_tokens_are_left_out(byte_level):
    eos = byte_level.eos_token_id
    ids = encode(byte_level, "the")
    stream = TextStream(byte_level)
    assert "".join(stream_all(stream, [eos, *ids, eos, eos, *ids, eos])) == "thethe"


def test_random_bytes_stream_to_the_text_that_decoding_them_at_once_gives(byte_level):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(byte_level)) for _ in range(rng.randrange(1, 25))]
        stream = TextStream(byte_level)
        assert "".join(stream_all(stream, ids)) == byte_level.decode(ids, skip_special_tokens=True)


def test_text_comes_no_later_than_from_the_tokenizers_library(byte_level):
    ids = encode(byte_level, "the engine 😀 naïve 日本 text")
    reference, stream = DecodeStream(skip_special_tokens=True), TextStream(byte_level)
    expected = ""
    for token_id in ids:
        stream.push(token_id)
        expected += reference.step(byte_level.backend_tokenizer, token_id) or ""
        assert stream.text.startswith(expected)
    assert stream.text == expected == "the engine 😀 naïve 日本 text"


def test_a_long_run_of_tokens_without_text_costs_the_same_each(byte_level):
    stream = TextStream(byte_level)
    stream.push(encode(byte_level, "a")[0])
    start = time.perf_counter()
    for _ in range(20_000):
        assert stream.push(byte_level.eos_token_id) == ""
    # Decoding the whole run at every token would take minutes.
    assert time.perf_counter() - start < 3


def test_spaces_between_words_survive_a_decoder_that_strips_the_first(sentencepiece):
    ids = ids_of(sentencepiece, "▁hello", "▁world", "▁", "▁world")
    stream = TextStream(sentencepiece)
    assert stream_all(stream, ids) == ["hello", " world", " ", " world", ""]


def test_a_word_that_continues_the_context_keeps_its_leading_space(sentencepiece):
    hello, world = ids_of(sentencepiece, "▁hello", "▁world")
    assert TextStream(sentencepiece).push(world) == "world"
    assert TextStream(sentencepiece, context=[hello]).push(world) == " world"


def test_a_context_that_ends_inside_a_character_is_completed(byte_level):
    ids = encode(byte_level, "the 🦊")
    stream = TextStream(byte_level, context=ids[:-2])
    assert [stream.push(token_id) for token_id in ids[-2:]] == ["", "🦊"]


def test_byte_fallback_tokens_join_to_characters(sentencepiece):
    ids = ids_of(sentencepiece, "▁hello", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "a", "<0xF0>")
    parts = stream_all(TextStream(sentencepiece), ids)
    assert parts == ["hello", "", "", "", "🦊", "a", "", "\ufffd"]


def test_a_tokenizer_without_a_fast_backend_is_refused():
    class SlowTokenizer:
        pass

    with pytest.raises(ModelError, match=r"SlowTokenizer has no fast backend.*tokenizer\.json"):
        TextStream(SlowTokenizer())


# Stop strings


def characters(tokenizer, text):
    """One token per character, whatever merges the tokenizer has."""
    return [token_id for char in text for token_id in encode(tokenizer, char)]


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_string_across_tokens_ends_the_text(byte_level, include_stop):
    stream = TextStream(byte_level, ["STOP"], include_stop)
    parts = stream_all(stream, characters(byte_level, "go on STOP and never this"))
    assert "".join(parts) == stream.text == ("go on STOP" if include_stop else "go on ")
    assert stream.stopped
    assert stream.stop_reason == "STOP"


def test_a_stop_string_inside_one_token_cuts_it(byte_level):
    (the,) = encode(byte_level, " the")
    stream = TextStream(byte_level, ["h"])
    assert stream.push(the) == " t"
    assert stream.stopped


def test_text_is_held_back_only_while_it_may_become_a_stop_string(byte_level):
    stream = TextStream(byte_level, ["abcd"])
    parts = [stream.push(token_id) for token_id in characters(byte_level, "xabcabcx")]
    assert parts == ["x", "", "", "", "abc", "", "", "abcx"]


def test_what_was_held_back_comes_out_at_the_end(byte_level):
    stream = TextStream(byte_level, ["abcd"])
    parts = stream_all(stream, characters(byte_level, "abc"))
    assert parts == ["", "", "", "abc"]
    assert not stream.stopped


@pytest.mark.parametrize(
    ("stop", "text", "left", "reason"),
    [
        (["abc", "b"], "abc", "a", "b"),  # "b" is complete before "abc" is
        (["b", "ab"], "xab", "x", "ab"),  # both complete at once: the longer
        (["ab", "abc"], "abc", "", "ab"),
        (["aab"], "aaab", "a", "aab"),  # begins inside a failed beginning
        (["abab!", "bax"], "ababax", "aba", "bax"),
        (["\n\n"], "one\n\ntwo", "one", "\n\n"),
        (["🦊"], "a🦊b", "a", "🦊"),
    ],
)
def test_the_stop_string_that_is_complete_first_wins_however_tokens_fall(
    byte_level, stop, text, left, reason
):
    for ids in (characters(byte_level, text), encode(byte_level, text)):
        stream = TextStream(byte_level, stop)
        assert "".join(stream_all(stream, ids)) == left
        assert stream.stop_reason == reason


def test_random_stop_strings_cut_where_a_character_by_character_search_does(byte_level):
    rng = random.Random(1)
    stopped = 0
    for _ in range(500):
        text = "".join(rng.choices("ab", k=12))
        stop = ["".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(2)]
        ends = [end for end in range(13) if any(text[:end].endswith(s) for s in stop)]
        expected = text
        if ends:
            found = max((s for s in stop if text[: ends[0]].endswith(s)), key=len)
            expected = text[: ends[0] - len(found)]
        for ids in (characters(byte_level, text), encode(byte_level, text)):
            stream = TextStream(byte_level, stop)
            assert "".join(stream_all(stream, ids)) == expected
            assert stream.stopped == bool(ends)
        stopped += bool(ends)
    assert 50 < stopped < 450


def test_nothing_follows_a_stop(byte_level):
    stream = TextStream(byte_level, ["a"])
    ids = characters(byte_level, "ab")
    assert [stream.push(token_id) for token_id in ids] == ["", ""]
    assert stream.flush() == ""
    assert stream.text == ""


def test_stop_strings_count_only_from_the_last_required_token_on(byte_level):
    ids = characters(byte_level, "aaxaxa")
    stream = TextStream(byte_level, ["a"], min_tokens=3)
    parts = [stream.push(token_id) for token_id in ids]
    assert parts == ["a", "a", "x", "", "", ""]
    assert stream.text == "aax"
    at_last = TextStream(byte_level, ["a"], min_tokens=2)
    assert [at_last.push(token_id) for token_id in ids[:2]] == ["a", ""]
    assert at_last.stopped
