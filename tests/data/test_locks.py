"""Several processes in one place: one goes on, the others wait or are told."""

import errno
import fcntl
import multiprocessing
import os
import time

import pytest

from checkpoint.run_directory import sole_writer
from configs.checks import UserError
from data.locks import wait_for_lock
from data.pipeline import Corpus, prepare_corpus
from tests import tiny

CONTEXT = multiprocessing.get_context("forkserver")
"""Processes of a server that has imported what they need once: a second and a half for each."""
CONTEXT.set_forkserver_preload(["checkpoint.run_directory", "data.pipeline", "tests.tiny"])


def start(function, *arguments):
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def enter(run_dir) -> None:
    with sole_writer(run_dir):
        pass


def hold_run(run_dir, ready) -> None:
    with sole_writer(run_dir):
        ready.set()
        time.sleep(60)


def test_a_second_process_is_refused_a_runs_folder_until_the_first_ends(tmp_path):
    """In whatever way it ends."""
    ready = CONTEXT.Event()
    first = start(hold_run, tmp_path / "run", ready)
    assert ready.wait(30)
    with pytest.raises(UserError, match=rf"another process \({first.pid}\) is training in .*run"):
        enter(tmp_path / "run")
    first.kill()
    first.join()
    enter(tmp_path / "run")


def test_a_name_in_braces_is_no_trap(tmp_path):
    with sole_writer(tmp_path / "{x}"), pytest.raises(UserError, match=r"\{x\}: wait for it"):
        enter(tmp_path / "{x}")


def make(run, barrier, stamps) -> None:
    barrier.wait()
    corpus = prepare_corpus(run.data, 300)
    stamps.put((corpus.directory / "train.bin").stat().st_mtime_ns)


def test_of_a_sweep_one_makes_the_corpus_and_all_have_it(tmp_path):
    tiny.write_sources(tmp_path)
    run, barrier, stamps = tiny.run(tmp_path), CONTEXT.Barrier(3), CONTEXT.Queue()
    (tmp_path / "corpus.building").mkdir()  # what a killed process has left
    processes = [start(make, run, barrier, stamps) for _ in range(3)]
    found = {stamps.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(found) == 1
    assert Corpus(tmp_path / "corpus").training().sidecar.num_tokens > 0
    assert {path.name for path in tmp_path.iterdir()} == {"sources", "corpus"}


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch, capsys):
    def flock(_file, _operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    enter(tmp_path / "run")
    assert "can't be locked here (No locks available)" in capsys.readouterr().out


def take(path, log) -> None:
    with wait_for_lock(path, "waiting"):
        write_line(log, f"{os.getpid()} begin")
        time.sleep(0.05)
        write_line(log, f"{os.getpid()} end")


def write_line(log, line: str) -> None:
    """At once, behind all that is there: a queue's own threads would write when they can."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def test_who_waits_for_a_lock_has_it_alone(tmp_path):
    processes = [start(take, tmp_path / "lock", tmp_path / "log") for _ in range(3)]
    for process in processes:
        process.join(timeout=60)
    events = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(events) == 6
    for begin, end in zip(events[::2], events[1::2], strict=True):
        assert (begin[0], begin[1], end[1]) == (end[0], "begin", "end")
    assert not (tmp_path / "lock").exists()
