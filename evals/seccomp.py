"""System calls that no program in the sandbox needs, refused by the kernel: a seccomp filter.

The filter is classic BPF, as the kernel reads it (Linux, Documentation/userspace-api/
seccomp_filter.rst): it looks at a call's architecture, number and first argument.
"""

import errno
import platform
import struct

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""BPF: ld [k]; jeq; jge; jset; ret k."""
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data; of the first argument its lower half."""
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
X32 = 0x40000000
"""Numbers from here on are those of a second ABI of x86-64, which would pass by the list."""
NEW_NAMESPACE = 0x7E020000
"""The CLONE_NEW flags that clone takes."""

Numbers = tuple[int, int]
"""Of a call on x86-64 and on 64-bit ARM."""

REFUSED: dict[str, Numbers] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    # Memory that counts as no process's own.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
}

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Place in Numbers, and AUDIT_ARCH."""
CLONE: Numbers = (56, 220)
CLONE3 = 435


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """The compiled filter; None for a machine whose calls' numbers are not listed here.

    A refused call fails with EPERM. `clone` is refused where it asks for a namespace; `clone3`
    does not exist (ENOSYS), as its flags lie in memory that no filter sees: libraries take `clone`.
    """
    place, architecture = MACHINES.get(machine or platform.machine(), (None, 0))
    if place is None:
        return None
    refused = sorted(numbers[place] for numbers in REFUSED.values())
    eperm, enosys = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, eperm),
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, enosys),
    ]
    # Each of the list jumps over those after it, and over the five of clone, to the last line.
    for i, number in enumerate(refused):
        program.append((EQUAL, len(refused) - i - 1 + 4, 0, number))
    program += [
        (EQUAL, 0, 2, CLONE[place]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 1, 0, NEW_NAMESPACE),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, eperm),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in program)
