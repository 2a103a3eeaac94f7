"""A battery of escapes from the sandbox, each with what stops it, and what ends a program."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evals.sandbox import Outcome, run_program
from evals.sandbox import _descendants as sandbox_descendants
from evals.sandbox_command import MIB, Limits
from tests.evals.sandbox_here import needs_filter, needs_sandbox

ROOT = Path(__file__).resolve().parents[2]


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
