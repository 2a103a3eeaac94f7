"""Which tokens begin and end a text, by the files that transformers reads them from."""

from pathlib import Path
from typing import Any

import pytest

from configs.checks import UserError
from data.tokenizers.public_tokenizer import read_public_tokenizer
from data.tokenizers.special_tokens import listed_token_ids
from infer.chat import chat_ids
from tests.checkpoint.tiny_folder import byte_level, write_tokenizer

FIRST, SECOND = "<|im_start|>", "<|im_end|>"


def write(folder: Path, **files: dict[str, Any]) -> None:
    write_tokenizer(folder, byte_level(FIRST, SECOND), **files)


SPELT = {"eos_token": {"content": SECOND, "special": True}}
CASES: dict[str, tuple[dict[str, Any], int | None, set[int]]] = {
    "config alone": ({"config": {"eos_token_id": [0, 281]}}, 0, {0, 281}),
    "config of one": ({"config": {"eos_token_id": 281}}, 281, {281}),
    "the lowest is not the eos": (
        {"tokenizer_config": SPELT, "generation_config": {"eos_token_id": [0, 281]}},
        281,
        {0, 281},
    ),
    "a map of special tokens": ({"special_tokens_map": SPELT}, 281, {281}),
    "the map fills in a null": (
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": SPELT},
        281,
        {281},
    ),
    "tokenizer_config goes before the map": (
        {"tokenizer_config": SPELT, "special_tokens_map": {"eos_token": "<|endoftext|>"}},
        281,
        {281},
    ),
    "generation_config goes before config": (
        {"generation_config": {"eos_token_id": 281}, "config": {"eos_token_id": 5}},
        281,
        {281},
    ),
    "a null says nothing": (
        {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [281, 0]}},
        281,
        {0, 281},
    ),
    "nulls in a list": ({"generation_config": {"eos_token_id": [None, 0]}}, 0, {0}),
    "null everywhere": (
        {
            "generation_config": {"eos_token_id": None},
            "config": {"eos_token_id": None},
            "tokenizer_config": {"eos_token": None, "bos_token": None},
            "special_tokens_map": {"eos_token": None},
        },
        None,
        set(),
    ),
    "an id of the config beyond the tokenizer": (
        {"config": {"eos_token_id": [281, 200_002]}},
        281,
        {281},
    ),
    "a spelling of nothing": ({"tokenizer_config": {"eos_token": ""}}, None, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_what_ends_an_answer(case: str, tmp_path: Path):
    files, eos_id, eos_ids = CASES[case]
    write(tmp_path, **files)
    tokenizer = read_public_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (eos_id, eos_ids)


def test_the_bos_may_be_in_the_map(tmp_path: Path):
    write(tmp_path, special_tokens_map={"bos_token": FIRST})
    assert read_public_tokenizer(tmp_path).bos_id == 280


def test_a_chat_ends_its_turns_with_the_eos_token(tmp_path: Path):
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    write(
        tmp_path,
        tokenizer_config=SPELT | {"chat_template": template},
        generation_config={"eos_token_id": [0, 281]},
    )
    tokenizer = read_public_tokenizer(tmp_path)
    ids = chat_ids(tokenizer, [{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids, specials=True) == f"hello{SECOND}"
    assert ids[-1] == 281


WRONG = {
    "a word": ({"config": {"eos_token_id": "x"}}, "config.json has eos_token_id='x'"),
    "a truth": ({"config": {"eos_token_id": True}}, "config.json has eos_token_id=True"),
    "a list of lists": ({"config": {"eos_token_id": [[1]]}}, r"eos_token_id=\[1\]"),
    "no token": (
        {"generation_config": {"eos_token_id": 9999}},
        "generation_config.json has eos_token_id=9999, which is no token",
    ),
    "no such name": (
        {"special_tokens_map": {"eos_token": "<end>"}},
        "special_tokens_map.json has eos_token='<end>', which is no token",
    ),
    "a list of names": ({"special_tokens_map": {"eos_token": ["a"]}}, r"eos_token=\['a'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_meant_is_told(case: str, tmp_path: Path):
    files, sentence = WRONG[case]
    write(tmp_path, **files)
    with pytest.raises(UserError, match=sentence):
        read_public_tokenizer(tmp_path)


def test_ids_of_a_model_without_a_tokenizer(tmp_path: Path):
    assert listed_token_ids(tmp_path) == {}
    write(tmp_path, config={"eos_token_id": [0, 2], "bos_token_id": 1})
    assert listed_token_ids(tmp_path) == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    write(tmp_path, generation_config={"eos_token_id": 2, "bos_token_id": None})
    assert listed_token_ids(tmp_path) == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("kind", ["truncation", "padding"])
def test_a_saved_batch_does_not_change_a_prompt(kind: str, tmp_path: Path):
    tokenizer = byte_level()
    text = "The capital of France is Paris and hello world"
    whole = tokenizer.encode(text).ids
    if kind == "truncation":
        tokenizer.enable_truncation(4)
    else:
        tokenizer.enable_padding(length=40, direction="left")
    assert tokenizer.encode(text).ids != whole
    write_tokenizer(tmp_path, tokenizer)
    read = read_public_tokenizer(tmp_path)
    assert read.encode(text) == whole
    assert read.encode(text, specials=True) == whole
