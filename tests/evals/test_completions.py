"""Completions of the quickstart: text that goes on from its prompt."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from evals import compare
from tests.checkpoint.tiny_folder import sentencepiece


def test_a_completion_keeps_the_space_after_its_prompt(monkeypatch: pytest.MonkeyPatch):
    """A tokenizer of words drops the space that begins a text."""
    tokenizer = sentencepiece()
    answer = tokenizer.encode("hello").ids
    assert tokenizer.decode(answer) == "hello"
    monkeypatch.setattr(compare, "read_run", lambda run_dir: None)
    monkeypatch.setattr(compare, "load_model", lambda run, run_dir: (None, None))
    monkeypatch.setattr(compare, "read_run_tokenizer", lambda run, run_dir: tokenizer)
    made = SimpleNamespace(tokens=[answer])
    monkeypatch.setattr(compare, "generate", lambda *_, **__: made)
    found = compare.complete(Path("it"), ["hello"], max_new_tokens=1)
    assert found == {"hello": " hello"}
