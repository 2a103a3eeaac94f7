"""The sandbox's command lines: what bubblewrap is told, and the launcher that runs inside.

Bubblewrap gives the program namespaces of its own (no network, private process numbers), a file
system of the machine's programs and libraries, read-only, and a scratch in memory. The launcher
then sets limits of the kernel on its own process and runs the program in it.
"""

import os
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.checks import UserError

MIB = 2**20

PROGRAM, SCRATCH = "/program.py", "/scratch"
SHARED_MEMORY_BYTES = 16 * MIB

INSTALL = "apt-get install bubblewrap, or your system's package of that name"

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": SCRATCH,
    "TMPDIR": SCRATCH,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same order of sets each time
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that the program has of it."""

LAUNCHER = """
import os, resource, sys
started, uid, *values = map(int, sys.argv[1:9])
names = ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE")
for name, value in zip(names, values):
    if value < 0:
        continue
    limit = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
os.write(started, b"1")
os.close(started)
sys.argv = sys.argv[9:]
__file__ = sys.argv[0]
del os, resource, sys, started, uid, values, names, name, value, limit, hard
exec(compile(open(__file__, "rb").read(), __file__, "exec"))
"""
"""Limits the process, leaves the user root for one without rights, tells that it has, and runs the
program in its place: a second interpreter would take as long to start as all the rest."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a program in the sandbox; what goes beyond them fails or is ended."""

    seconds: float = 10.0
    """From start to end, whatever the program does meanwhile."""
    memory_bytes: int = 512 * MIB
    """Address space of each process; and of all processes together, what is resident."""
    processes: int = 16
    """Processes and threads at once."""
    scratch_bytes: int = 64 * MIB
    scratch_files: int = 10_000
    file_bytes: int = 32 * MIB
    output_bytes: int = MIB
    """Of stdout and stderr together."""
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise UserError(f"{name}={value} must be greater than 0")


def find_bubblewrap() -> str:
    """The path of the program `bwrap`.

    Raises:
      UserError: it is not installed.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise UserError(
            "a model's code runs only in a sandbox, and bubblewrap is not installed here: install "
            f"it ({INSTALL}), or give --unprotected to run the code with your own rights"
        )
    return found


def sandboxed(
    bubblewrap: str, limits: Limits, *, program: int, started: int, seccomp: int | None
) -> list[str]:
    """The command that runs a program in the sandbox.

    Args:
      program, started, seccomp: file descriptors that the command inherits: the program's text,
        where the launcher writes a byte before it runs the program, the filter of system calls.
    """
    return [
        bubblewrap,
        *_rights(),
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--hostname", "sandbox", "--die-with-parent", "--new-session"),
        "--clearenv",
        *_flat(("--setenv", name, value) for name, value in ENVIRONMENT.items()),
        *_system(),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", "--size", str(SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm"),
        *("--perms", "1777", "--size", str(limits.scratch_bytes), "--tmpfs", SCRATCH),
        *("--perms", "0444", "--ro-bind-data", str(program), PROGRAM),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", SCRATCH),
        *(() if seccomp is None else ("--seccomp", str(seccomp))),
        "--",
        *launched(limits, started=started, program=PROGRAM, uid=_transient_user()),
    ]


def launched(
    limits: Limits, *, started: int, program: str, uid: int = 0, is_alone: bool = True
) -> list[str]:
    """The command that limits itself, writes a byte to `started` and runs the program.

    Args:
      uid: of the user to become; 0 stays who it is.
      is_alone: whether the program's processes are counted by themselves. Otherwise all of the
        user's count, and their number is not limited.
    """
    bounds = (
        limits.memory_bytes,
        int(limits.seconds) + 2,  # of processor time; the parent's clock comes first
        limits.file_bytes,
        limits.open_files,
        limits.processes if is_alone else -1,
        0,  # core files
    )
    # -S: the standard library alone, so that a score does not hang on what else is installed.
    launcher = [_interpreter(), "-S", "-s", "-P", "-c", LAUNCHER]
    return [*launcher, str(started), str(uid), *map(str, bounds), program]


def _rights() -> Sequence[str]:
    """Root keeps what the launcher needs to become another user, as the kernel bounds root's
    processes by no number; anybody else gets namespaces by a user namespace."""
    if os.geteuid() == 0:
        return ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    return ("--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL")


def _transient_user() -> int:
    """A user id for this run alone; 0 where bubblewrap runs without root's rights.

    From the range that systemd has set aside for such users.
    """
    return random.SystemRandom().randint(61184, 65519) if os.geteuid() == 0 else 0


def _system() -> list[str]:
    """Programs and libraries, read-only; no user's files, and of /etc the linker's cache."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        path = Path(name)
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            options += ["--ro-bind", name, name]
    options += ["--perms", "0755", "--dir", "/etc"]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        # Above a folder in somebody's home bubblewrap would make folders that only root enters.
        for folder in reversed(prefix.parents[:-1]):
            options += ["--perms", "0755", "--dir", str(folder)]
        options += ["--ro-bind", str(prefix), str(prefix)]
    return options


def _interpreter() -> str:
    """The Python of this process, outside its virtual environment."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    of_prefix = Path(sys.base_prefix).resolve() / "bin" / f"python{version}"
    return str(of_prefix if of_prefix.exists() else Path(sys.executable).resolve())


def _flat(groups) -> list[str]:
    return [word for group in groups for word in group]
