"""The sandbox: its command line, its filter of system calls, and a battery of escapes, each with
what stops it."""

import itertools
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.checks import UserError
from evals import sandbox_command, seccomp
from evals.sandbox import Outcome, run_program
from evals.sandbox import _descendants as sandbox_descendants
from evals.sandbox_command import MIB, PROGRAM, SCRATCH, Limits, launched, sandboxed
from scripts import sandbox as verb

ROOT = Path(__file__).resolve().parents[2]


def unsupported_reason() -> str | None:
    """Why no sandbox can start here."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    try:
        run_program("pass")
    except UserError as error:
        return str(error)
    return None


REASON = unsupported_reason()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_filter = pytest.mark.skipif(
    platform.machine() not in seccomp.MACHINES, reason="no filter of system calls for this machine"
)


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


# --- Escapes ---


def refused(program: str, by: str, limits: Limits | None = None) -> Outcome:
    """Runs an escape, which prints ESCAPED if it gets through, and checks what stopped it."""
    outcome = run_program(program, limits)
    assert "ESCAPED" not in outcome.stdout
    assert not outcome.is_success
    assert by in outcome.reason()
    return outcome


@needs_sandbox
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            "import socket\n"
            f"socket.create_connection(('127.0.0.1', {port}), timeout=2)\nprint('ESCAPED')"
        )
        refused(program, "ConnectionRefusedError")  # by a loopback of its own
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    refused(
        "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=2)\nprint('ESCAPED')",
        "OSError: [Errno 101] Network is unreachable",
    )
    interfaces = run_program("import socket; print([name for _, name in socket.if_nameindex()])")
    assert interfaces.stdout == "['lo']\n"


@needs_sandbox
def test_no_socket_of_the_machine(tmp_path):
    """Names of sockets that lie in no file system belong to the network's namespace."""
    name = f"\0moesaic-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        program = (
            f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})\nprint('ESCAPED')"
        )
        refused(program, "ConnectionRefusedError")


@needs_sandbox
def test_a_fork_bomb_meets_the_limit_of_processes():
    before = len(os.listdir("/proc"))
    program = "import os, time\nwhile True:\n    os.fork()\n"
    outcome = run_program(program, Limits(seconds=2))
    assert "BlockingIOError" in outcome.stderr
    assert not outcome.is_success
    counted = run_program(
        "import os, time\n"
        "for n in range(99):\n"
        "    try:\n"
        "        if not os.fork(): time.sleep(9)\n"
        "    except BlockingIOError:\n"
        "        print(n, flush=True); os._exit(0)\n",
        Limits(processes=8),
    )
    assert 0 < int(counted.stdout) < 8
    time.sleep(0.2)
    assert len(os.listdir("/proc")) < before + 8  # none is left


@needs_sandbox
def test_the_scratch_is_bounded_and_nothing_else_can_be_written():
    fill = (
        "n = 0\n"
        "while True:\n"
        "    with open(f'{n}', 'wb') as file: file.write(bytes(2**20))\n"
        "    n += 1\n"
    )
    refused(fill, "No space left on device", Limits(scratch_bytes=8 * MIB))
    for place in ("/", "/usr", "/dev", "/proc", "/etc", "/proc/sys/kernel"):
        outcome = refused(f"open('{place}/x', 'w')\nprint('ESCAPED')", "Error")
        assert any(word in outcome.reason() for word in ("Read-only", "denied", "No such file"))
    refused("open('/dev/shm/x', 'wb').write(bytes(2**25))\nprint('ESCAPED')", "No space left")


@needs_sandbox
def test_a_file_is_bounded_and_so_is_the_number_of_files():
    refused(
        "open('big', 'wb').write(bytes(2**22))\nprint('ESCAPED')",
        "File too large",
        Limits(file_bytes=MIB),
    )
    many = "n = 0\nwhile True:\n    open(f'{n}', 'w').close()\n    n += 1\n"
    refused(many, "too many files", Limits(scratch_files=500))


@needs_sandbox
def test_secrets_outside_are_not_there(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("ESCAPED")
    secret.chmod(0o644)
    here = Path(__file__).resolve()
    for path in ("/etc/shadow", "/etc/passwd", secret, here, Path.home() / ".netrc"):
        refused(f"print(open('{path}').read())\nprint('ESCAPED')", "Error")
    environment = run_program("import os; print(sorted(os.environ))").stdout
    assert "PIP" not in environment
    assert "USER" not in environment


@needs_sandbox
def test_no_descriptor_of_ours_is_left_open(tmp_path):
    with open(tmp_path / "ours", "w") as file:
        os.set_inheritable(file.fileno(), True)
        found = run_program("import os; print(len(os.listdir('/proc/self/fd')))")
    assert int(found.stdout) == 4  # three streams, and the listing itself


@needs_sandbox
@needs_filter
def test_ptrace_and_new_namespaces_are_refused_by_the_filter():
    call = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
    raise_it = "if r < 0: raise OSError(ctypes.get_errno(), 'refused')\nprint('ESCAPED')\n"
    refused(f"{call}r = c.ptrace(0, 0, 0, 0)\n{raise_it}", "PermissionError")  # PTRACE_TRACEME
    refused(f"{call}r = c.ptrace(16, 1, 0, 0)\n{raise_it}", "PermissionError")  # PTRACE_ATTACH
    refused(f"{call}r = c.unshare(0x10000000)\n{raise_it}", "PermissionError")  # a user namespace
    refused(f"{call}r = c.mount(b'x', b'/scratch', b'tmpfs', 0, 0)\n{raise_it}", "PermissionError")
    refused("import os\nos.memfd_create('x')\nprint('ESCAPED')", "PermissionError")


@needs_sandbox
def test_rights_cannot_be_had_back():
    refused("import os\nos.setuid(0)\nopen('/x', 'w')\nprint('ESCAPED')", "Error")
    status = run_program("print(open('/proc/self/status').read())").stdout
    lines = (line.partition(":") for line in status.splitlines())
    fields = {name: value.strip() for name, _, value in lines}
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert fields["Uid"].split()[0] != "0"


@needs_sandbox
def test_a_race_of_symbolic_links_leads_nowhere(tmp_path):
    """While a link is turned from the scratch to a file outside and back, no write arrives there:
    outside is not in the sandbox's tree."""
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    program = (
        "import os, threading, time\n"
        "end = time.time() + 1\n"
        "def turn():\n"
        "    while time.time() < end:\n"
        f"        for target in ('/scratch/inside', {str(victim)!r}):\n"
        "            os.symlink(target, 'new'); os.replace('new', 'link')\n"
        "thread = threading.Thread(target=turn); thread.start()\n"
        "missed = 0\n"
        "while time.time() < end:\n"
        "    try: open('link', 'w').write('ESCAPED')\n"
        "    except OSError: missed += 1\n"
        "print(missed)\n"
    )
    outcome = run_program(program)
    assert int(outcome.stdout) > 0, outcome.stderr
    assert victim.read_text() == "whole"


@needs_sandbox
def test_the_parent_cannot_be_signalled():
    refused(
        f"import os\nos.kill({os.getpid()}, 9)\nprint('ESCAPED')",
        "ProcessLookupError",
    )
    refused(f"import os\nos.killpg({os.getpgid(0)}, 9)\nprint('ESCAPED')", "ProcessLookupError")
    # Its own first process does not hear it, or takes all of the sandbox with it.
    outcome = run_program("import os\nos.kill(-1, 9)\nos.kill(1, 9)\nprint('alive')")
    assert outcome.ended in ("exit", "signal")


@needs_sandbox
def test_proc_shows_the_sandboxs_processes_alone():
    outcome = run_program(
        "import os\nprint([p for p in os.listdir('/proc') if p.isdigit()])\n"
        "print(os.path.exists('/proc/1/root/etc/passwd'))"
    )
    listed, leads_out = outcome.stdout.splitlines()
    assert len(eval(listed)) <= 3
    assert leads_out == "False"
    for path in (
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/self/oom_score_adj",
    ):
        value = "-1000" if path.endswith("adj") else "c"
        writing = f"import os\nos.write(os.open('{path}', os.O_WRONLY), b'{value}')\n"
        refused(f"{writing}print('ESCAPED')", "Error")
    refused("print(open('/proc/kcore', 'rb').read(1), 'ESCAPED')", "Error")


@needs_sandbox
def test_huge_output_is_cut():
    outcome = refused("while True: print('x' * 1000)", "too much output", Limits(output_bytes=5000))
    assert len(outcome.stdout) == 5000
    both = "import sys\nwhile True: print('x' * 99); print('y' * 99, file=sys.stderr)"
    outcome = refused(both, "too much output", Limits(output_bytes=5000))
    assert len(outcome.stdout) + len(outcome.stderr) == 5000


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "sum(range(10**13))",
        "import re; re.match('(a+)+b', 'a' * 60)",
        "import signal\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\n10**10**9",
        "import os, time\nos.setsid()\nos.close(1); os.close(2)\ntime.sleep(60)",
        "try:\n    while True: pass\nexcept BaseException:\n    while True: pass",
    ],
)
def test_endless_work_is_ended_by_the_clock(program):
    begin = time.monotonic()
    outcome = refused(program, "not done after", Limits(seconds=0.7, memory_bytes=2**31))
    assert outcome.ended == "time"
    assert time.monotonic() - begin < 5


@needs_sandbox
def test_memory_is_bounded_for_a_process_and_for_all_together():
    refused("x = bytearray(2**29)\nprint('ESCAPED')", "MemoryError", Limits(memory_bytes=2**28))
    together = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if not os.fork():\n"
        "        x = bytearray(b'x') * 50_000_000\n"
        "        time.sleep(9)\n"
        "time.sleep(9)\n"
    )
    refused(together, "too much memory", Limits(memory_bytes=2**27, seconds=9))


@needs_sandbox
def test_what_a_program_leaves_running_ends_with_it():
    program = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(60)\n"
    begin = time.monotonic()
    assert run_program(program, Limits(seconds=30)).is_success
    assert time.monotonic() - begin < 10


@needs_sandbox
def test_a_program_ends_when_who_started_it_is_killed():
    source = "from evals.sandbox import *\nrun_program('import time; time.sleep(90)')"
    with subprocess.Popen([sys.executable, "-c", source], cwd=ROOT) as parent:
        program: list[int] = []
        while len(program) < 2:  # bubblewrap's outer process, and those inside
            assert parent.poll() is None
            program = list(sandbox_descendants(parent.pid))
            time.sleep(0.01)
        parent.kill()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in program):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_sandbox
def test_programs_run_side_by_side():
    outcomes = []
    threads = [
        threading.Thread(target=lambda i=i: outcomes.append(run_program(f"print({i})").stdout))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [f"{i}\n" for i in range(6)]


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
