"""Tokenizers of folders in Hugging Face form."""

import json
from pathlib import Path

import pytest

from configs.checks import UserError
from data.tokenizers.public_tokenizer import read_public_tokenizer
from data.tokenizers.tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["to be or not to be"] * 3, 260)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_what_lies_beside_it_counts(folder: Path):
    bos = {"content": "<s>", "lstrip": False}
    config = {"bos_token": bos, "eos_token": "</s>", "add_bos_token": True, "chat_template": "old"}
    write(folder, "tokenizer_config.json", config)
    write(folder, "generation_config.json", {"eos_token_id": [0, 261]})
    (folder / "chat_template.jinja").write_text("new")
    tokenizer = read_public_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (260, {0, 261})
    assert tokenizer.chat_template == "new"
    ids = tokenizer.encode("to be</s>")
    assert ids[0] == 260
    assert 261 not in ids
    assert tokenizer.decode(ids) == "to be</s>"
    assert tokenizer.encode("be</s>", specials=True, bos=False)[-1] == 261


def test_a_tokenizer_alone(folder: Path):
    tokenizer = read_public_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (None, frozenset(), False)
    assert tokenizer.text_of(tokenizer.bos_id) == ""
    assert tokenizer.vocab_size == 262


def test_a_post_processor_says_whether_bos_begins(folder: Path):
    write(folder, "tokenizer_config.json", {"bos_token": "<s>"})
    assert not read_public_tokenizer(folder).add_bos
    values = json.loads((folder / "tokenizer.json").read_text())
    pieces = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    specials = {"<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": specials,
    }
    write(folder, "tokenizer.json", values)
    tokenizer = read_public_tokenizer(folder)
    assert tokenizer.add_bos
    assert tokenizer.encode("to")[0] == 260
    assert tokenizer.encode("to", bos=False)[0] != 260


def test_the_template_named_default_is_taken(folder: Path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert read_public_tokenizer(folder).chat_template == "d"


WRONG = {
    "no such token": ({"bos_token": "<bos>"}, "bos_token='<bos>', which is no token"),
    "a number": ({"eos_token": 3}, "eos_token=3, which is no token"),
    "a list": ([1], "is a JSON list, expected an object"),
    "a template of numbers": ({"chat_template": 1}, "chat_template that is neither text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions_are_refused(case: str, folder: Path):
    values, sentence = WRONG[case]
    write(folder, "tokenizer_config.json", values)
    with pytest.raises(UserError, match=sentence):
        read_public_tokenizer(folder)


def test_no_tokenizer_is_told(folder: Path):
    write(folder, "generation_config.json", {"eos_token_id": "x"})
    with pytest.raises(UserError, match="eos_token_id='x', which is no token"):
        read_public_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        read_public_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing: other forms"):
        read_public_tokenizer(folder)
