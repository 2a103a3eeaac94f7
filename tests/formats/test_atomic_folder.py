"""A folder appears whole or not at all, and unfinished work is found again."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.checks import UserError
from formats.atomic_folder import partial_file, partial_folder, replace_text
from formats.safetensors.reader import open_tensors

ROOT = Path(__file__).parents[2]
WORKER = """
import sys, time, pathlib
import numpy as np
from formats.atomic_folder import partial_folder
from formats.safetensors.writer import TensorWriter
plan = [(f"t{i}", np.float32, (1000,)) for i in range(8)]
with (
    partial_folder(pathlib.Path(sys.argv[1]), "settings") as folder,
    TensorWriter(folder, plan, max_shard_bytes=9000) as writer,
):
    for i, (name, _, _) in enumerate(plan):
        if not writer.done(name):
            print("write", name, flush=True)
            writer.write(name, np.full(1000, i, np.float32))
        if i == int(sys.argv[2]):
            time.sleep(60)
"""


class Stopped(Exception):
    pass


def worker(destination, sleep_after) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(destination), str(sleep_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)


def test_killed_in_mid_write_and_started_again(tmp_path):
    destination = tmp_path / "out"
    child = worker(destination, sleep_after=4)
    assert child.stdout is not None
    written = [child.stdout.readline().split()[1] for _ in range(5)]
    assert written == ["t0", "t1", "t2", "t3", "t4"]
    with pytest.raises(UserError, match=r"another process is at work in .*out\.partial"):
        partial_folder(destination, "settings").__enter__()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert os.listdir(tmp_path) == ["out.partial"]
    output, _ = (again := worker(destination, sleep_after=-1)).communicate()
    assert again.returncode == 0
    assert output.split()[1::2] == ["t4", "t5", "t6", "t7"]  # two whole shards were kept
    assert os.listdir(tmp_path) == ["out"]
    assert not (destination / ".made_from").exists()
    files = open_tensors(destination)
    for i in range(8):
        np.testing.assert_array_equal(files.read(f"t{i}"), np.full(1000, i, np.float32))


def leave_unfinished(destination, fingerprint="a"):
    def work():
        with partial_folder(destination, fingerprint) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("half")
            raise Stopped

    with pytest.raises(Stopped):
        work()
    assert not destination.exists()


def test_failed_work_is_kept_for_the_same_fingerprint_only(tmp_path):
    destination = tmp_path / "deep" / "out"
    leave_unfinished(destination)
    with partial_folder(destination, "a") as folder:
        assert folder == tmp_path / "deep" / "out.partial"
        assert (folder / "sub" / "file").read_text() == "half"
    assert sorted(p.name for p in destination.rglob("*")) == ["file", "sub"]
    leave_unfinished(tmp_path / "other")
    with partial_folder(tmp_path / "other", "b") as folder:
        assert not (folder / "sub").exists()


def test_an_empty_destination_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with partial_folder(tmp_path / "out", "a") as folder:
        (folder / "file").write_text("whole")
    assert os.listdir(tmp_path / "out") == ["file"]


def make_file(path):
    path.write_text("mine")


def make_folder(path):
    path.mkdir()
    (path / "mine").write_text("mine")


def make_link(path):
    path.symlink_to("/nowhere")


@pytest.mark.parametrize("make", [make_file, make_folder, make_link])
@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_what_is_there_already_is_never_removed(tmp_path, make, name):
    make(tmp_path / name)
    before = sorted(map(str, tmp_path.rglob("*")))
    with (
        pytest.raises(UserError, match=rf"/{name} .*move it away"),
        partial_folder(tmp_path / "out", "a"),
    ):
        raise AssertionError("must not come here")
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_destination_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def work():
        with partial_folder(tmp_path / "out", "a") as folder:
            (folder / "ours").write_text("ours")
            make_folder(tmp_path / "out")

    with pytest.raises(UserError, match="out exists already"):
        work()
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert (tmp_path / "out.partial" / "ours").read_text() == "ours"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    make_file(tmp_path / "file")
    with pytest.raises(UserError, match="can't be made"):
        partial_folder(tmp_path / "file" / "out", "a").__enter__()


def test_a_file_comes_alone_out_of_its_folder(tmp_path):
    destination = tmp_path / "out.gguf"
    with contextlib.suppress(Stopped), partial_file(destination, "settings") as path:
        path.write_text("half")
        (path.parent / "notes").write_text("1")
        raise Stopped
    assert os.listdir(tmp_path) == ["out.gguf.partial"]
    with partial_file(destination, "settings") as path:
        assert path.read_text() == "half"
        path.write_text("whole")
    assert os.listdir(tmp_path) == ["out.gguf"]
    assert destination.read_text() == "whole"
    with pytest.raises(UserError, match="exists already"):
        partial_file(destination, "settings").__enter__()
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        partial_file(tmp_path / "folder.gguf", "settings").__enter__()


def test_a_refusal_leaves_nothing(tmp_path):
    for kept in (partial_file, partial_folder):
        with pytest.raises(Stopped), kept(tmp_path / "out", "settings"):
            raise Stopped
        assert not os.listdir(tmp_path)


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    replace_text(path, "old")

    def half_written(self, text, encoding):
        self.write_bytes(text.encode(encoding)[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half_written)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "the new one")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    replace_text(path, "the new one")
    assert path.read_text() == "the new one"
