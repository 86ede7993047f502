"""Lines, prompts and answers compose, and the tasks' words are single tokens."""

from tamis.bench.tasks import corpus
from tamis.bench.tasks.words import ADJECTIVES, NOUNS, VALUE_WORDS


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_tokens_of_a_text_are_those_of_its_lines(tokenizer):
    lines = corpus.haystack_lines()[:3000]
    joined = [token for line in lines for token in ids(tokenizer, line)]
    assert joined == ids(tokenizer, "".join(lines))


def test_prompt_and_answer_compose(tokenizer):
    for prompt, answer in [
        ("Q: What is the magic number for amber-falcon? A:", " 48392\n"),
        ("Q: What is key icy-reef? A: icy-reef =", " walnut\n"),
        ("Q: What is the value of AB? A: AB =", " CD = 123\n"),
    ]:
        whole = ids(tokenizer, prompt + answer)
        assert whole == ids(tokenizer, prompt) + ids(tokenizer, answer)


def test_names_and_words_are_one_token_and_digits_are_alone(tokenizer):
    assert all(len(ids(tokenizer, f" {word}")) == 1 for word in (*ADJECTIVES, *VALUE_WORDS))
    assert all(len(ids(tokenizer, f"-{noun}")) == 2 for noun in NOUNS)
    assert len(ids(tokenizer, " 48392")) == 5
    assert tokenizer.tokenize("x = 48\n")[-3:] == ["Ġ4", "8", "Ċ"]


def test_any_text_survives_a_round_trip(tokenizer):
    text = "naïve \t  Größe 😀\n\n    def f(x): return x_1**2  # 100%\n"
    assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id


def test_the_chat_template_asks_the_last_line_of_a_message(tokenizer):
    chat = [
        {"role": "user", "content": "one\ntwo\nWhat is key a-b?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And key c-d?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>one\ntwo\nQ: What is key a-b? A: 5\nQ: And key c-d? A:"
