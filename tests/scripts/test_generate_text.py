"""Text as `scripts.generate` prints it, from models that answer what a test planted in them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from scripts import generate
from tests.checkpoint.tiny_folder import byte_level, sentencepiece, write_llama, write_tokenizer


def answer(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What comes before the line of figures."""
    generate.main([str(folder), "--max-new-tokens", "4", *more])
    return capsys.readouterr().out.split("\n---")[0]


def model(folder: Path, tokenizer: Tokenizer, *texts: str, **files: dict[str, Any]) -> Path:
    """A model that goes on as the texts do."""
    config = files.pop("config", {})
    ids = [tokenizer.encode(text).ids for text in texts]
    pairs = {a: b for text in ids for a, b in itertools.pairwise(text)}
    write_llama(folder, pairs, **config)
    write_tokenizer(folder, tokenizer, **files)
    return folder


def test_the_space_after_the_prompt(tmp_path: Path, capsys):
    folder = model(tmp_path / "it", sentencepiece(), "hello w hello")
    assert answer(folder, capsys, "--prompt", "hello w", "--max-new-tokens", "1") == "hello w hello"


def test_an_unfinished_character_at_the_end(tmp_path: Path, capsys):
    folder = model(tmp_path / "it", byte_level(), "aあ")
    assert answer(folder, capsys, "--prompt", "a", "--max-new-tokens", "2") == "a�"
    assert answer(folder, capsys, "--prompt", "a", "--max-new-tokens", "3") == "aあ"


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"eos_token_id": [0, 280]}},
        {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [0, 280]}},
        {"special_tokens_map": {"eos_token": "<|im_end|>"}},
        {"tokenizer_config": {"eos_token": "<|im_end|>"}},
    ],
)
def test_generation_stops_at_what_any_file_names(files: dict[str, Any], tmp_path: Path, capsys):
    tokenizer = byte_level("<|im_end|>")
    folder = model(tmp_path / "it", tokenizer, "ab<|im_end|>cd", **files)
    assert answer(folder, capsys, "--prompt", "a") == "ab"


def test_a_long_prompt_is_not_cut(tmp_path: Path, capsys):
    tokenizer = byte_level()
    tokenizer.enable_truncation(1)
    folder = model(tmp_path / "it", byte_level(), "xyz")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert answer(folder, capsys, "--prompt", "xy", "--max-new-tokens", "1") == "xyz"
