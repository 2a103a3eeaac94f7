"""A tokenizer's way through every form: what ends an answer, what begins a text, and no truncation
or padding of somebody's batches.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data.tokenizers.public_tokenizer import PublicTokenizer
from infer.convert import Conversion, Form, convert
from infer.sources import open_source
from tests.checkpoint.tiny_folder import (
    TEXT,
    byte_level,
    sentencepiece,
    write_llama,
    write_tokenizer,
)

ENDS = {
    "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"},
    "generation_config": {"eos_token_id": [0, 281]},
}
FORMS: tuple[Form, ...] = ("huggingface", "gguf", "orbax")


def source_of(folder: Path, tokenizer: Tokenizer, **files: dict[str, Any]) -> Path:
    config = files.pop("config", {})
    write_llama(folder, **config)
    write_tokenizer(folder, tokenizer, **files)
    return folder


def converted(source: Path, to: Form) -> Path:
    target = source.with_name(f"{source.stem}_{to}" + (".gguf" if to == "gguf" else ""))
    convert(open_source(str(source)), target, Conversion(to=to))
    return target


def tokenizer_of(path: Path) -> PublicTokenizer:
    return open_source(str(path)).tokenizer()


def token_ids(path: Path) -> dict[str, Any]:
    names = ("config.json", "generation_config.json")
    found = [json.loads((path / name).read_text()) for name in names if (path / name).exists()]
    ids = [{k: v for k, v in values.items() if k.endswith("os_token_id")} for values in found]
    assert all(each == ids[0] for each in ids)
    return ids[0]


@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for a in FORMS for b in FORMS if {a, b} != {"gguf"}]
)
def test_ends_stay_through_every_form(first: Form, second: Form, tmp_path: Path):
    """The eos_token is not the lowest of them."""
    source = source_of(tmp_path / "it", byte_level("<|im_start|>", "<|im_end|>"), **ENDS)
    last = converted(converted(source, first), second)
    tokenizer = tokenizer_of(last)
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.bos_id) == (281, {0, 281}, 0)
    if second == "huggingface":
        assert token_ids(last) == {"bos_token_id": 0, "eos_token_id": [281, 0]}
        config = json.loads((last / "tokenizer_config.json").read_text())
        assert config["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("through", [None, "orbax"])
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_how_a_model_is_sampled_stays(through: Form | None, has_tokenizer: bool, tmp_path: Path):
    said = {"eos_token_id": [0, 280], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    source = source_of(tmp_path / "it", byte_level("<|im_end|>"), generation_config=said)
    if not has_tokenizer:
        (source / "tokenizer.json").unlink()
    target = converted(converted(source, through) if through else source, "huggingface")
    assert json.loads((target / "generation_config.json").read_text()) == said
    bare = source_of(tmp_path / "bare", byte_level())
    made = json.loads((converted(bare, "huggingface") / "generation_config.json").read_text())
    assert made == {"_from_model_config": True}


@pytest.mark.parametrize("to", FORMS)
def test_ends_that_config_alone_lists_stay(to: Form, tmp_path: Path):
    source = source_of(tmp_path / "it", byte_level("<|im_end|>"), config={"eos_token_id": [0, 280]})
    assert tokenizer_of(converted(source, to)).eos_ids == {0, 280}


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_ends_in_the_map_of_special_tokens_stay(to: Form, tmp_path: Path):
    names = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    source = source_of(tmp_path / "it", byte_level("<|im_end|>"), special_tokens_map=names)
    tokenizer = tokenizer_of(converted(source, to))
    assert (tokenizer.eos_id, tokenizer.bos_id) == (280, 0)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("kind", ["truncation", "padding"])
def test_a_saved_batch_stays_out_of_an_export(to: Form, kind: str, tmp_path: Path):
    tokenizer = byte_level()
    whole = tokenizer.encode(TEXT).ids
    if kind == "truncation":
        tokenizer.enable_truncation(4)
    else:
        tokenizer.enable_padding(length=40)
    target = converted(source_of(tmp_path / "it", tokenizer), to)
    assert tokenizer_of(target).encode(TEXT) == whole
    if to != "gguf":
        assert Tokenizer.from_file(str(target / "tokenizer.json")).encode(TEXT).ids == whole


def test_a_tokenizer_with_nothing_to_change_is_copied_as_it_is(tmp_path: Path):
    source = source_of(tmp_path / "it", byte_level())
    text = json.dumps(json.loads((source / "tokenizer.json").read_text()), indent=3)
    (source / "tokenizer.json").write_text(text)
    target = converted(source, "huggingface")
    assert (target / "tokenizer.json").read_text() == text


BOS = {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}}
EMPTY = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
PROCESSORS: dict[str, Any] = {
    "none": None,
    "of nothing": EMPTY,
    "bytes": BYTES,
    "several": {"type": "Sequence", "processors": [BYTES, EMPTY]},
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("through", ["", "gguf", "orbax"])
def test_an_exported_tokenizer_adds_the_bos_itself(processor: str, through: Form, tmp_path: Path):
    """transformers 5 goes by tokenizer.json's post-processor, not by add_bos_token (5.24: the ids
    of AutoTokenizer are those of the file)."""
    source = source_of(tmp_path / "it", sentencepiece(), **BOS)
    path = source / "tokenizer.json"
    state = json.loads(path.read_text()) | {"post_processor": PROCESSORS[processor]}
    path.write_text(json.dumps(state))
    between = converted(source, through) if through else source
    target = converted(between, "huggingface")
    ids = Tokenizer.from_file(str(target / "tokenizer.json")).encode("hello")
    assert ids.ids == [1, *Tokenizer.from_file(str(path)).encode("hello").ids]
    pair = Tokenizer.from_file(str(target / "tokenizer.json")).encode("hello", "hello")
    assert pair.ids == ids.ids * 2
    assert tokenizer_of(target).encode("hello") == ids.ids


def test_a_tokenizer_that_adds_no_bos_gets_none(tmp_path: Path):
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    source = source_of(tmp_path / "it", sentencepiece(), tokenizer_config=names)
    target = converted(converted(source, "gguf"), "huggingface")
    assert Tokenizer.from_file(str(target / "tokenizer.json")).encode("hello").ids[0] != 1


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model", "vocab.json"])
def test_a_tokenizer_in_another_form_is_told_and_copied(to: Form, name: str, tmp_path: Path):
    source = tmp_path / "it"
    write_llama(source, eos_token_id=[2, 7], bos_token_id=1)
    (source / name).write_bytes(b"\x0a\x03")
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    notes: list[str] = []
    target = source.with_name("out" + (".gguf" if to == "gguf" else ""))
    convert(open_source(str(source)), target, Conversion(to=to), notes=notes.append)
    assert len(notes) == 1
    assert f"has its tokenizer as {name} alone" in notes[0]
    assert ("left out" if to == "gguf" else "copied") in notes[0]
    if to != "gguf":
        assert (target / name).read_bytes() == b"\x0a\x03"
        assert token_ids(target) == {"bos_token_id": 1, "eos_token_id": [2, 7]}
        again = converted(target, "huggingface")
        assert token_ids(again) == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_a_model_without_any_tokenizer_is_told(tmp_path: Path):
    write_llama(tmp_path / "it")
    notes: list[str] = []
    convert(
        open_source(str(tmp_path / "it")),
        tmp_path / "out",
        Conversion(to="orbax"),
        notes=notes.append,
    )
    assert notes == [f"{tmp_path / 'it'} has no tokenizer: the model is written without one"]
