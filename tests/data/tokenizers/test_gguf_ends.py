"""Tokens of a GGUF file that end an answer: llama.cpp's rules (src/llama-vocab.cpp), by case."""

from typing import Any

import pytest

from configs.checks import UserError
from data.tokenizers.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED, tokenizer_from_gguf
from data.tokenizers.gguf_tokenizer_write import tokenizer_to_gguf
from data.tokenizers.public_tokenizer import PublicTokenizer
from tests.checkpoint.tiny_folder import byte_level

LETTERS = ["a", "b", "c"]


def metadata(*specials: str, kind: int = CONTROL, **ids: int) -> dict[str, Any]:
    """A tokenizer of three letters (ids 0 to 2) and these tokens (from 3)."""
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*LETTERS, *specials],
        "merges": [],
        "token_type": [NORMAL] * 3 + [kind] * len(specials),
    }
    values |= {f"{name}_token_id": i for name, i in ids.items()}
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


SPELT = [
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<end_of_utterance>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<PAD>",
    "<reponame>",
]


@pytest.mark.parametrize("text", SPELT)
def test_a_token_is_known_by_its_text(text: str):
    read = tokenizer_from_gguf(metadata("<s>", text), "here")
    assert read.eos_ids == {4}
    assert read.eos_id == 4
    assert read.decode([0, 4]) == "a"


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
def test_its_type_does_not_matter(kind: int):
    """llama.cpp makes a control token of it, too."""
    read = tokenizer_from_gguf(metadata("<|im_end|>", kind=kind), "here")
    assert read.eos_ids == {3}
    assert read.decode([0, 3]) == "a"
    assert read.encode("a<|im_end|>", specials=True) == [0, 3]


def test_what_the_file_names_goes_along():
    values = metadata("<x>", "<|eot_id|>", "<y>", "<z>", "<|fim_pad|>", eos=3, eom=5, fim_pad=6)
    read = tokenizer_from_gguf(values, "here")
    assert (read.eos_id, read.eos_ids) == (3, {3, 4, 5, 6})


def test_the_end_of_turn_stands_in_for_a_missing_eos():
    read = tokenizer_from_gguf(metadata("<|endoftext|>", "<|eot_id|>", eot=4), "here")
    assert (read.eos_id, read.eos_ids) == (4, {3, 4})


def test_a_sentencepiece_that_names_nothing_begins_with_1_and_ends_with_2():
    """llama.cpp's defaults for the kind."""
    values = {"model": "llama", "tokens": ["<unk>", "<a>", "<b>", "▁", "x", "▁x"]}
    values |= {"scores": [0.0] * 6, "token_type": [2, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL]}
    read = tokenizer_from_gguf({f"tokenizer.ggml.{k}": v for k, v in values.items()}, "here")
    assert (read.bos_id, read.eos_id, read.eos_ids, read.add_bos) == (1, 2, {2}, True)
    assert read.encode("x") == [1, 5]


@pytest.mark.parametrize(
    ("specials", "ends"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], {4, 5}),
        (["<|end|>", "<|calls|>", "<|flush|>"], {4, 5}),
        (["<|end|>", "<|return|>"], {3, 4}),
        (["</s>", "<|tool_response>"], {4}),
        (["<s>", "<|im_start|>", "<|start_header_id|>"], set()),
    ],
)
def test_the_end_of_a_message_is_no_end_beside_others(specials: list[str], ends: set[int]):
    assert tokenizer_from_gguf(metadata(*specials), "here").eos_ids == ends


def public(*specials: str, ends: set[str], eos: str | None = None) -> PublicTokenizer:
    tokenizer = byte_level(*specials)
    tokenizer.encode_special_tokens = True
    ids = frozenset(tokenizer.token_to_id(text) for text in ends)
    eos_id = None if eos is None else tokenizer.token_to_id(eos)
    return PublicTokenizer(tokenizer, None, ids, False, eos_id=eos_id)


@pytest.mark.parametrize(
    ("specials", "eos", "names"),
    [
        (["<x>", "<y>"], "<y>", {"eos": "<y>", "eot": "<x>"}),
        (["<x>", "<y>", "<z>"], "<y>", {"eos": "<y>", "eot": "<x>", "eom": "<z>"}),
        (["<|im_end|>", "<x>"], "<|im_end|>", {"eos": "<|im_end|>", "eot": "<x>"}),
        (
            ["<|eom_id|>", "<|eot_id|>", "<|end_of_text|>"],
            "<|eot_id|>",
            {"eos": "<|eot_id|>", "eot": "<|end_of_text|>", "eom": "<|eom_id|>"},
        ),
        (["<|eom_id|>", "<|eot_id|>"], "<|eot_id|>", {"eos": "<|eot_id|>", "eom": "<|eom_id|>"}),
        (
            ["<|im_end|>", "<|eot_id|>", "<x>", "<y>", "<eos>"],
            "<|im_end|>",
            {"eos": "<|im_end|>", "eot": "<x>", "eom": "<y>"},
        ),
    ],
)
def test_ends_are_written_by_name(specials: list[str], eos: str, names: dict[str, str]):
    """Those that llama.cpp would not find first; all come back, and the eos with them."""
    tokenizer = public(*specials, ends=set(specials), eos=eos)
    made = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    texts = {name: made.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    found = {k: tokenizer.tokenizer.id_to_token(i) for k, i in texts.items() if i is not None}
    assert found == names
    again = tokenizer_from_gguf(made, "here")
    assert again.eos_id == tokenizer.eos_id
    assert again.eos_ids >= tokenizer.eos_ids


def test_an_eos_is_always_named():
    """Without one llama.cpp takes token 11 of a byte-level vocabulary, whatever it is."""
    made = tokenizer_to_gguf(public("<x>", "<y>", ends={"<x>", "<y>"}), 300)
    assert made["tokenizer.ggml.eos_token_id"] == 280


def test_more_unknown_ends_than_names_are_told():
    tokenizer = public("<w>", "<x>", "<y>", "<z>", ends={"<w>", "<x>", "<y>", "<z>"}, eos="<w>")
    with pytest.raises(UserError, match=r"4 tokens that end an answer, and GGUF .* '<z>'"):
        tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
