"""The sandbox: its command line, its filter of system calls, programs that behave, the verb."""

import itertools
import os
import resource
import struct
import sys
from pathlib import Path

import pytest

from configs.checks import UserError
from evals import sandbox_command, seccomp
from evals.sandbox import run_program
from evals.sandbox_command import PROGRAM, SCRATCH, Limits, launched, sandboxed
from scripts import sandbox as verb
from tests.evals.sandbox_here import needs_sandbox

ROOT = Path(__file__).resolve().parents[2]


# --- The command line, on any machine ---


def pairs(command: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(command))


@pytest.mark.parametrize("user", [0, 1000])
def test_the_command_shuts_out_network_processes_and_files(monkeypatch, user):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    command = sandboxed("bwrap", Limits(), program=7, started=8, seccomp=9)
    ours = command[: command.index("--")]
    for name in ("ipc", "pid", "net", "uts"):
        assert f"--unshare-{name}" in ours
    assert {"--die-with-parent", "--new-session", "--clearenv"} <= set(ours)
    assert ("--cap-drop", "ALL") in pairs(ours)
    assert ("--remount-ro", "/") in pairs(ours)
    assert ("--seccomp", "9") in pairs(ours)
    # Nothing outside can be written: what is bound is bound read-only, what is writable is new.
    assert not {"--bind", "--bind-try", "--dev-bind", "--share-net"} & set(ours)
    bound = [after for word, after in pairs(ours) if word.startswith("--ro-bind")]
    prefix = str(Path(sys.base_prefix).resolve())
    libraries = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
    assert set(bound) <= {*libraries, prefix, "7"}
    writable = [i for i, word in enumerate(ours) if word == "--tmpfs"]
    assert [ours[i + 1] for i in writable] == ["/dev/shm", SCRATCH]
    assert all(ours[i - 2] == "--size" for i in writable)


def test_root_becomes_a_user_without_rights_and_others_take_a_user_namespace(monkeypatch):
    def build(user):
        monkeypatch.setattr(os, "geteuid", lambda: user)
        return sandboxed("bwrap", Limits(), program=7, started=8, seccomp=None)

    def uid(command):
        return int(command[command.index(sandbox_command.LAUNCHER) + 2])

    assert "--unshare-user" in build(1000)
    assert uid(build(1000)) == 0
    assert "--unshare-user" not in build(0)
    assert 61184 <= uid(build(0)) <= 65519


def test_the_launcher_is_told_each_limit():
    limits = Limits(seconds=3.5, memory_bytes=5, file_bytes=6, open_files=7, processes=8)
    command = launched(limits, started=4, program=PROGRAM, uid=9)
    begin = command.index(sandbox_command.LAUNCHER) + 1
    assert command[begin : begin + 8] == ["4", "9", "5", "5", "6", "7", "8", "0"]
    assert command[-1] == PROGRAM
    # Outside, all processes of the user would count.
    assert launched(limits, started=4, program=PROGRAM, is_alone=False)[begin + 6] == "-1"


def test_limits_must_be_positive():
    with pytest.raises(UserError, match="processes=0 must be greater than 0"):
        Limits(processes=0)


def test_without_bubblewrap_one_sentence_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"bubblewrap is not installed here.*--unprotected"):
        run_program("print(1)")
    assert run_program("print(1)", unprotected=True).stdout == "1\n"


def test_a_bubblewrap_that_cannot_start_is_told_in_its_words(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"can't start here \(bwrap: No permissions to create"):
        run_program("print(1)")


def test_unprotected_code_still_has_limits():
    limits = Limits(seconds=1.0)
    assert run_program("while True: pass", limits, unprotected=True).ended == "time"
    outcome = run_program("x = bytearray(10**9)", unprotected=True)
    assert outcome.reason() == "MemoryError"


# --- The filter, run by an interpreter of its few instructions ---


def decide(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """What the kernel would answer: the instructions as its documentation defines them."""
    data = struct.pack("=IIQQ", number, architecture, 0, argument)
    lines = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at, register = 0, 0
    while True:
        code, if_true, if_false, k = lines[at]
        at += 1
        if code == 0x20:
            (register,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            return k
        else:
            holds = {0x15: register == k, 0x35: register >= k, 0x45: bool(register & k)}[code]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_refuses_its_list_and_nothing_else(machine):
    place, architecture = seccomp.MACHINES[machine]
    program = seccomp.seccomp_filter(machine)
    assert program is not None
    refused = {numbers[place] for numbers in seccomp.REFUSED.values()}
    assert len(refused) == len(seccomp.REFUSED)
    eperm, enosys, allow = 0x00050001, 0x00050026, 0x7FFF0000
    for number in range(600):
        expected = eperm if number in refused else enosys if number == 435 else allow
        assert decide(program, architecture, number) == expected, number
    clone = seccomp.CLONE[place]
    for flag in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(program, architecture, clone, flag | 17) == eperm
    thread = 0x3D0F00  # as glibc starts one
    assert decide(program, architecture, clone, thread) == allow
    assert decide(program, architecture ^ 1, 0) == 0x80000000
    assert decide(program, architecture, 0x40000000 + 101) == eperm


def test_other_machines_have_no_filter():
    assert seccomp.seccomp_filter("riscv64") is None


# --- Programs that behave ---


@needs_sandbox
def test_a_program_runs_and_its_end_is_told():
    outcome = run_program("import math, sys; print(math.pi); sys.exit(3)")
    assert (outcome.ended, outcome.code, outcome.stdout) == ("exit", 3, "3.141592653589793\n")
    assert not outcome.is_success
    assert run_program("pass").is_success
    failed = run_program("assert 1 == 2, 'ä'")
    assert failed.reason() == "AssertionError: ä"
    killed = run_program("import os; os.kill(os.getpid(), 11)")
    assert (killed.ended, killed.code) == ("signal", 11)
    assert killed.reason() == "ended by SIGSEGV"


@needs_sandbox
def test_a_program_may_write_to_its_scratch_start_threads_and_processes():
    outcome = run_program(
        "import os, subprocess, tempfile, threading\n"
        "open('note', 'w').write('kept')\n"
        "tempfile.mkdtemp()\n"
        "print(open('/scratch/note').read())\n"
        "thread = threading.Thread(target=lambda: print('thread'))\n"
        "thread.start(); thread.join()\n"
        "print(subprocess.run(['echo', 'process'], capture_output=True, text=True).stdout)\n"
    )
    assert outcome.stdout.split() == ["kept", "thread", "process"], outcome.stderr
    assert "note" not in run_program("import os; print(os.listdir('.'))").stdout


@needs_sandbox
def test_a_program_is_the_main_module_and_sees_nothing_of_its_launcher():
    outcome = run_program(
        "import sys\n"
        "print(sorted(name for name in globals() if not name.startswith('__')))\n"
        "print(__name__, __file__, sys.argv, sys.modules['__main__'].__dict__ is globals())\n"
    )
    assert outcome.stdout.splitlines() == [
        "['sys']",
        "__main__ /program.py ['/program.py'] True",
    ]
    failed = run_program("def f():\n    return 1 / 0\nf()\n")
    assert "line 2, in f\n    return 1 / 0" in failed.stderr
    unreadable = run_program("def f(:\n")
    assert unreadable.reason() == "SyntaxError: invalid syntax"


@needs_sandbox
def test_nothing_is_read_from_stdin_and_texts_are_the_same_each_time():
    assert run_program("print(repr(input()))").reason() == "EOFError: EOF when reading a line"
    program = "print({str(i) for i in range(99)})"
    assert run_program(program).stdout == run_program(program).stdout


@needs_sandbox
def test_the_start_takes_at_most_50_ms_above_bubblewraps_own():
    """In processor time, which other work on the machine stretches least: of bubblewrap's outer
    process, of this one, and of the program's process from its fork to its first line, which has
    bubblewrap's work on namespaces and mounts in it. The quickest of many."""
    program = "import time; print(time.process_time())"
    ours = []
    for _ in range(15):
        before = _processor_seconds()
        outcome = run_program(program)
        ours.append(_processor_seconds() - before + float(outcome.stdout))
    assert 0.001 < min(ours) < 0.05


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# --- The verb ---


@needs_sandbox
def test_the_verb_gives_the_programs_output_and_code(tmp_path, capsys):
    path = tmp_path / "program.py"
    path.write_text("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert verb.main([str(path)]) == 7
    assert capsys.readouterr() == ("out\n", "err\n")
    path.write_text("while True: pass")
    assert verb.main([str(path), "--seconds", "0.5"]) == 1
    assert "stopped: not done after 0.5 s" in capsys.readouterr().err


def test_the_verb_says_what_it_cannot_read(tmp_path):
    path = tmp_path / "program.py"
    path.write_bytes(b"print('\xff')")
    with pytest.raises(UserError, match="is no Python program in UTF-8"):
        verb.main([str(path)])
