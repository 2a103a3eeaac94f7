"""Streamed text against the text of all tokens at once."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.text_stream import TextStream
from tests.checkpoint.tiny_folder import byte_level, sentencepiece

KINDS = {"bytes": byte_level, "pieces": sentencepiece}


def public(kind: str) -> PublicTokenizer:
    tokenizer: Any = KINDS[kind]()
    return PublicTokenizer(tokenizer, None, frozenset({0}), False)


def streamed(stream: TextStream, ids: list[int]) -> str:
    return "".join([stream.add([token]) for token in ids]) + stream.finish()


def test_the_space_after_a_prompt_is_kept():
    """The tokenizer drops the space that begins a text: decoded alone, the answer loses it."""
    tokenizer = public("pieces")
    prompt, both = tokenizer.encode("hello"), tokenizer.encode("hello hello")
    answer = both[len(prompt) :]
    assert both[: len(prompt)] == prompt
    assert streamed(TextStream(tokenizer, prompt), answer) == " hello"
    assert tokenizer.decode(answer) == "hello"
    assert streamed(TextStream(tokenizer), answer) == "hello"


def test_a_begin_of_text_alone_is_no_text_before():
    tokenizer = public("pieces")
    assert streamed(TextStream(tokenizer, [1]), tokenizer.encode("hello hello")) == "hello hello"


def test_special_tokens_between_words():
    tokenizer = public("pieces")
    hello = tokenizer.encode("hello")
    assert streamed(TextStream(tokenizer), [1, *hello, 2, *hello]) == "hello hello"


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_waits_for_its_bytes(kind: str):
    tokenizer = public(kind)
    stream = TextStream(tokenizer, tokenizer.encode("hello"))
    first = len(tokenizer.encode("hello"))
    ids = tokenizer.encode("helloあé")[first:]
    shown = [stream.add([token]) for token in ids]
    assert shown == ["", "", "あ", "", "é"]
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_character_ends_a_text(kind: str):
    """A text cut by max_new_tokens shows that something was there."""
    tokenizer = public(kind)
    ids = tokenizer.encode("helloあ")[:-1]
    text = streamed(TextStream(tokenizer), ids)
    assert text == tokenizer.decode(ids)
    assert text.startswith("hello�")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=st.text("hel あé🙂", max_size=6), text=st.text("hello worldあé🙂\n", max_size=20))
def test_any_text_comes_out_whole(kind: str, prompt: str, text: str):
    tokenizer = public(kind)
    before, after = tokenizer.encode(prompt), tokenizer.encode(text)
    whole, known = tokenizer.decode(before + after), tokenizer.decode(before)
    assert whole.startswith(known)
    assert streamed(TextStream(tokenizer, before), after) == whole[len(known) :]


def test_the_cost_of_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch):
    """The tokens that are decoded for each new one are few, however long the text."""
    tokenizer = public("bytes")
    ids = tokenizer.encode("hello world あ" * 300)
    decoded: list[int] = []

    class Counted(PublicTokenizer):
        def decode(self, ids: Any, *, specials: bool = False) -> str:
            decoded.append(len(ids))
            return super().decode(ids, specials=specials)

    counted = Counted(tokenizer.tokenizer, None, frozenset({0}), False)
    assert streamed(TextStream(counted, ids), ids) == "hello world あ" * 300
    assert max(decoded[20:]) < 12
