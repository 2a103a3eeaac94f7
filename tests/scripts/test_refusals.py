"""Folders that would run their sender's code, or read elsewhere: refused before any of it."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from scripts import command, convert, score
from tests.checkpoint.cases import write_case

opened: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if opened is not None and event == "open":
        opened.append(str(arguments[0]))


sys.addaudithook(_audit)  # for good: hooks can't be taken away


class Trap:
    """What a pickle may do when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def run(monkeypatch, capsys, verb, arguments: list[str]) -> tuple[str, list[str]]:
    """(stderr, the files opened) of a verb that must end with code 2."""
    global opened

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["verb", *arguments])
    opened = files = []
    try:
        with pytest.raises(SystemExit) as left:
            command.execute(verb.main)
    finally:
        opened = None
    assert left.value.code == 2
    return capsys.readouterr().err, files


def pickled(folder: Path) -> str:
    """The older form, with a pickle that leaves a mark when it is loaded."""
    write_case("llama", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(folder / "mark")))
    return "'pytorch_model.bin', which may run code when opened and is never opened here"


def pickled_with_an_index(folder: Path) -> str:
    pickled(folder)
    write_index(folder, "pytorch_model.bin")
    return "names the file 'pytorch_model.bin', which is no .safetensors file"


def an_index_to_another_folder(folder: Path) -> str:
    write_case("llama", folder)
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    write_index(folder, "../outside.safetensors")
    return "an index may only name files of its own folder"


def an_index_to_an_absolute_path(folder: Path) -> str:
    an_index_to_another_folder(folder)
    write_index(folder, str(folder.parent / "outside.safetensors"))
    return "an index may only name files of its own folder"


def write_index(folder: Path, file: str) -> None:
    text = json.dumps({"weight_map": {"model.norm.weight": file}})
    (folder / "model.safetensors.index.json").write_text(text)


def a_pipe(folder: Path) -> str:
    """Reading it would wait for ever."""
    write_case("llama", folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return "config.json is no plain file"


FOLDERS = [
    pickled,
    pickled_with_an_index,
    an_index_to_another_folder,
    an_index_to_an_absolute_path,
    a_pipe,
]


@pytest.mark.parametrize("make", FOLDERS)
@pytest.mark.parametrize("verb", ["score", "convert"])
def test_unsafe_folders_are_refused_unread(verb, make, tmp_path, monkeypatch, capsys):
    sentence = make(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "tokens.json").write_text("[1, 2]")
    if verb == "score":
        out = ["--tokens-file", str(tmp_path / "tokens.json"), "--logits", str(tmp_path / "l.npy")]
        err, files = run(monkeypatch, capsys, score, [str(tmp_path / "model"), *out])
    else:
        arguments = [str(tmp_path / "model"), str(tmp_path / "DST"), "--to", "huggingface"]
        err, files = run(monkeypatch, capsys, convert, arguments)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not [file for file in files if "pytorch_model" in file or "outside" in file]
    (tmp_path / "tokens.json").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_trap_would_close(tmp_path):
    """Or the test above could not fail."""
    global opened
    pickled(tmp_path)
    opened = files = []
    try:
        pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    finally:
        opened = None
    assert (tmp_path / "mark").exists()
    assert any("pytorch_model" in file for file in files)
